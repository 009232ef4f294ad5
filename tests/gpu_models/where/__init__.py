"""Answers on which device its worker runs."""

import os
import time

from model_interface import ModelInterface


class Model(ModelInterface):
    """Takes as many seconds as its input says. If ``args`` say "look", it asks torch, too, which GPUs there are."""

    def run(self, data, args):
        time.sleep(data)
        answer = {"pid": os.getpid(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "seen": []}
        if args["look"]:
            import torch

            uuids = [str(torch.cuda.get_device_properties(one).uuid) for one in range(torch.cuda.device_count())]
            answer["seen"] = [uuid if uuid.startswith("GPU-") else f"GPU-{uuid}" for uuid in uuids]
        return answer
