"""The inside of Tiny Model Server. The way of a request: protocols, engine, batcher, pool, worker, and back."""

__version__ = "1.0.0"

PLUGIN = "TINY_MODEL_SERVER_PLUGIN"
"""The variable that names a worker's model to what the model starts, as ``name=folder``."""
