"""Targets of ``tests/fuzz_parsers.py``: what each parser is given, and what may come of it."""

from itertools import chain

from tests.fuzzing import grpc_targets, http_targets, local_targets, value_targets, worker_targets
from tests.fuzzing.oracle import Target


def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    files = (grpc_targets, http_targets, local_targets, worker_targets, value_targets)
    made = chain.from_iterable(file.targets() for file in files)
    return {target.name: target for target in made}
