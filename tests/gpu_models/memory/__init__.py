"""Takes as many MiB of a GPU as each item says, of the little room that it leaves there. The CPU pretends to be one."""

import weakref

import torch

from model_interface import ModelInterface

MIB = 1 << 20


class Model(ModelInterface):
    """Answers {"mib", "batch"} for each item, and for "state" what has happened since the last one."""

    max_batch_size = 16
    max_wait_ms = 500

    def __init__(self, room_mib: int) -> None:
        self.tried: list[int] = []
        self.room = room_mib
        if torch.cuda.is_available():
            self.ballast = torch.empty(torch.cuda.mem_get_info()[0] - room_mib * MIB, dtype=torch.uint8, device="cuda")
            self.taken = torch.cuda.memory_allocated()

    def allocate(self, mib: int) -> torch.Tensor:
        if torch.cuda.is_available():
            return torch.ones(mib * MIB, dtype=torch.uint8, device="cuda")
        if mib > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory: the CPU pretends to have little")
        tensor = torch.ones(mib * MIB, dtype=torch.uint8)
        self.room -= mib
        weakref.finalize(tensor, self.give_back, mib)
        return tensor

    def give_back(self, mib: int) -> None:
        self.room += mib

    def run(self, data, args):
        if data != "state":
            return self.run_batch([data], args)[0]
        tried, self.tried = self.tried, []
        left = torch.cuda.memory_allocated() - self.taken if torch.cuda.is_available() else 0
        return {"tried": tried, "left": left}

    def run_batch(self, items, args):
        self.tried.append(len(items))
        tensors = []
        for mib in items:  # a frame that fails refers to these, as the frames of a network do
            tensors.append(self.allocate(mib))
        return [{"mib": int(one[::MIB].sum(dtype=torch.int64)), "batch": len(items)} for one in tensors]
