"""Stands for the server's own ``model_client``."""

from tiny_model_server.engine.worker_path import load

load(__name__)
