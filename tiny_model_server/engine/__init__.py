"""The heart: models, queues, batches and worker processes."""
