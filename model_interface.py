"""The interface of models: put ``class Model(ModelInterface)`` into ``models/<name>/__init__.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from tiny_model_server.custom_metrics import count, observe
from tiny_model_server.errors import InvalidInput

__all__ = ["InvalidInput", "ModelInterface", "Pipeline", "count", "observe"]


class ModelInterface(ABC):
    """A model. Only ``run`` is required; load weights in ``__init__``, which runs once in each worker process.

    Each class attribute below can be set from outside as ``TMS_MODEL_<NAME>_<KEY>``, for instance
    ``TMS_MODEL_EXAMPLE_WORKERS=2``.
    """

    max_batch_size: ClassVar[int | None] = None
    """Most items in one ``run_batch``; None means 32 if the class has a ``run_batch`` of its own, else 1."""
    max_wait_ms: ClassVar[float] = 0
    """How long the first item of a batch waits for more, in milliseconds. 0: never while a worker is idle."""
    workers: ClassVar[int] = 1
    """Processes that run this model."""
    max_workers: ClassVar[int] = 0
    """On Ray, where their number follows the load: the most there may be. 0: always ``workers``."""
    concurrency: ClassVar[int | None] = None
    """How many calls each worker runs at once: in threads, or on its event loop if ``run`` is ``async``; for models
    that wait on the network. None means 16 if ``run`` is ``async`` and there is no ``run_batch``, else 1."""
    timeout_s: ClassVar[float] = 60
    """Longest time that one batch may take, in seconds; past it the worker is killed and replaced."""
    load_timeout_s: ClassVar[float] = 300
    """Longest time for import, ``__init__`` and warm-up, in seconds."""
    queue_size: ClassVar[int] = 1024
    """Most items waiting; one more is refused with RESOURCE_EXHAUSTED."""
    devices: ClassVar[str | Sequence[str]] = "auto"
    """Where the workers run, in turn: "cuda:0,cuda:1" or a list of these; "cpu"; or "auto", which spreads them over all
    GPUs. A worker sees only its own GPU, as the first one (CUDA_VISIBLE_DEVICES)."""
    threads: int = 0
    """Set by the server before ``__init__``: the threads this worker may use, the cores divided by the workers.
    OpenMP, BLAS, torch and OpenCV use this number already. Pass it to onnxruntime as ``intra_op_num_threads``."""
    image_mode: ClassVar[str] = "rgb"
    """What an encoded image (JPEG, PNG, ...) is decoded to: "rgb" or "bgr" (HxWx3 uint8), "gray" (HxW uint8), or
    "unchanged" (as stored: any depth and channels, colours in BGR order)."""
    mix_shapes: ClassVar[bool] = False
    """True lets arrays of different shapes or dtypes share a batch."""
    metadata: ClassVar[dict[str, Any]] = {}
    """Facts for callers: "author", "version", "description", "inputs" and "outputs" (lists of {"name", "dtype",
    "shape"}, -1 for any size). An array that does not fit the only declared input is refused before it queues. "task":
    "embeddings" or "chat" lets OpenAI's clients call the model."""
    example: ClassVar[Any] = None
    """An input to run once before the model counts as ready (see ``warmup``)."""

    @abstractmethod
    def run(self, data: Any, args: Any) -> Any:
        """Returns the answer to one input.

        ``data`` is an image (ndarray, HxW or HxWxC), a text (str) or any tree of JSON values with arrays; ``args`` is
        the caller's dict, empty if there is none. The answer may be anything that JSON can hold, with numpy arrays,
        tensors, images, tables, dataclasses and more anywhere in it (docs/client.md lists them). Raise
        ``InvalidInput("why")`` for the caller's mistake; any other exception is reported as the model's. A generator
        streams what it yields to callers of ``run_stream``; others get the list.

        ``async def run``, which may be an async generator, runs on the worker's event loop. It is cancelled when its
        caller disconnects, or after ``timeout_s``. ``run_batch``, ``warmup`` and ``close`` may be ``async``, too.

        What ``data`` and ``args`` are annotated with (a pydantic model, a dataclass, ...) is checked before it runs.
        """

    def run_batch(self, items: list[Any], args: Any) -> Sequence[Any]:
        """Returns one result for each item, in order. An exception in an item's place fails that item alone.

        If this raises, the items are run one by one instead.
        """
        return [self.run(item, args) for item in items]

    def get_input_shape(self) -> Sequence[int] | None:
        """The shape that ``run`` wants, or None when any will do."""
        return None

    def warmup(self) -> Any:
        """Runs once after ``__init__`` and before the first request; by default it runs ``example``.

        What it returns is awaited if that is possible, and not used.
        """
        return None if self.example is None else self.run(self.example, {})

    def close(self) -> Any:
        """Runs when the worker is stopped, for 10 seconds at most.

        The worker ends then, with all tasks, threads and processes that the model has left running.
        """
        return None


class Pipeline(ModelInterface):
    """Runs other models one after the other: each answer is the input of the next model.

    Each stage is a model folder with workers and batches of its own. Stages work on different calls at the same time.
    An error ends the call at its stage. All stages get the call's ``args``.
    """

    stages: ClassVar[Sequence[str]] = ()
    """Names of model folders, in order."""

    def run(self, data: Any, args: Any) -> Any:
        """Never called: the server runs the stages."""
        raise NotImplementedError
