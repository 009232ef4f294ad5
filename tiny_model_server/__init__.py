"""The inside of Tiny Model Server. The way of a request: protocols, engine, batcher, pool, worker, and back."""

__version__ = "1.0.0"
