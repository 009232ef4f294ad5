"""A model's own metrics: collected in the worker, sent to the front with each batch, published there."""

import math
import re
import threading
from typing import Any

_NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
_lock = threading.Lock()
_counts: dict[str, float] = {}
_observations: dict[str, list[float]] = {}

CustomMetrics = tuple[dict[str, float], dict[str, list[float]]]


def count(name: str, amount: float = 1) -> None:
    """Adds to the counter ``tms_model_<name>_total``.

    ValueError for a wrong name, or an amount that is negative, infinite or NaN.
    """
    if (number := _finite(amount)) < 0:
        raise ValueError(f"a counter only grows; {amount} is negative")
    with _lock:
        _counts[_checked(name)] = _counts.get(name, 0) + number


def observe(name: str, value: float) -> None:
    """Adds a value to the histogram ``tms_model_<name>``; ValueError for a wrong name, an infinite value, or NaN."""
    number = _finite(value)
    with _lock:
        _observations.setdefault(_checked(name), []).append(number)


def drain() -> CustomMetrics:
    """Counts and observed values by name since the last call."""
    global _counts, _observations
    with _lock:
        drained = _counts, _observations
        _counts, _observations = {}, {}
    return drained


def _finite(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"a metric takes a number, not {value!r}")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"a metric takes a finite number, not {value}")
    return number


def _checked(name: str) -> str:
    if not (found := _NAME.fullmatch(name)):
        raise ValueError(f"a metric's name is small letters, digits and _, not {name!r}")
    return found[0]  # a plain str: the name may be of a subclass that the model defines
