"""Stands for the server's own ``model_interface``."""

from tiny_model_server.engine.worker_path import load

load(__name__)
