"""The first folder on ``sys.path`` of a worker, and of each process that its model starts.

It makes the server's own modules and ``models`` importable, and nothing else of the place where the server is
installed: what a model needs comes from the model's own interpreter. ``multiprocessing`` (spawn and forkserver) and
joblib hand ``sys.path`` to their processes, so functions of a model's module can be unpickled there.
"""
