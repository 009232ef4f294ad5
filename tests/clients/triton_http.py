"""tritonclient[http] by the REST form: binary and JSON tensors, repository. Arguments: host:port, a PNG file of 8x4."""

import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def tensors(*named, binary=True):
    made = []
    for name, array in named:
        made.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array, binary_data=binary)
    return made


client = triton.InferenceServerClient(sys.argv[1], concurrency=4)
assert client.is_server_live()
assert client.is_server_ready()
assert client.is_model_ready("echo")
assert not client.is_model_ready("nobody")
assert client.get_server_metadata()["name"] == "tiny-model-server"
assert client.get_model_metadata("declares")["inputs"][0]["datatype"] == "UINT8"
assert client.get_model_config("rows")["max_batch_size"] == 32
for binary in (True, False):
    for dtype in ["bool", *"int8 int16 int32 int64 uint8 uint16 uint32 uint64 float32 float64".split()]:
        array = np.arange(24).reshape(2, 4, 3).astype(dtype)
        wanted = [triton.InferRequestedOutput("output", binary_data=binary)]
        answer = client.infer("echo", tensors(("image", array), binary=binary), request_id="seven", outputs=wanted)
        assert answer.get_response()["id"] == "seven"
        found = answer.as_numpy("output")
        assert found.dtype == array.dtype, dtype
        assert (found == array).all(), dtype
    text = np.array(["Grüße".encode()], object)
    found = client.infer("echo", tensors(("text", text), binary=binary)).as_numpy("output")
    assert found[0] == text[0], found
two = client.infer("echo", tensors(("a", np.ones(3)), ("b", np.zeros((2, 2), "int32"))))
assert two.as_numpy("a").shape == (3,)
assert two.as_numpy("b").dtype == np.int32
said = client.infer("echo", tensors(("text", text)), parameters={"n": 3, "deep": True, "word": "x"})
assert b'"n": 3' in said.as_numpy("output")[0]
with open(sys.argv[2], "rb") as file:
    image_file = np.array([file.read()], object)
assert b'"shape": [4, 8, 3]' in client.infer("describe", tensors(("image", image_file))).as_numpy("output")[0]
rows = client.infer("rows", tensors(("x", np.arange(12, dtype="float32").reshape(4, 3))))
assert (rows.as_numpy("output") == np.arange(12, dtype="float32").reshape(4, 3) * 2).all()
try:
    client.infer("nobody", tensors(("x", np.ones(2))))
    raise SystemExit("no error")
except InferenceServerException as error:
    assert "there is no model" in error.message(), error
assert {model["name"]: model["state"] for model in client.get_model_repository_index()}["echo"] == "READY"
client.unload_model("masks")
assert not client.is_model_ready("masks")
client.load_model("masks")
assert client.is_model_ready("masks")
