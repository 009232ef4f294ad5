"""tritonclient[grpc]: blocking, asyncio, streams, repository. Arguments: address, a PNG file of 8x4 pixels."""

import asyncio
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def tensors(*named, kind=triton):
    made = []
    for name, array in named:
        made.append(kind.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


address = sys.argv[1]
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("echo")
assert client.get_server_metadata().name == "tiny-model-server"
assert client.get_model_metadata("declares").inputs[0].datatype == "UINT8"
assert client.get_model_config("declares").config.input[0].data_type == 2
for dtype in ("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64").split():
    array = np.arange(24).reshape(2, 4, 3).astype(dtype)
    answer = client.infer("echo", tensors(("image", array)), request_id="seven")
    assert answer.get_response().id == "seven"
    found = answer.as_numpy("output")
    assert found.dtype == array.dtype and (found == array).all(), dtype
text = np.array(["Grüße".encode()], object)
assert client.infer("echo", tensors(("text", text))).as_numpy("output")[0] == text[0]
two = client.infer("echo", tensors(("a", np.ones(3)), ("b", np.zeros((2, 2), "int32"))))
assert two.as_numpy("a").shape == (3,) and two.as_numpy("b").dtype == np.int32
one = client.infer("echo", tensors(("a", np.ones(3)), ("b", np.zeros(2))), outputs=[triton.InferRequestedOutput("b")])
assert one.as_numpy("a") is None and one.as_numpy("b").shape == (2,)
said = client.infer("echo", tensors(("text", text)), parameters={"n": 3, "deep": True, "word": "x"})
assert b'"n": 3' in said.as_numpy("output")[0] and b'"deep": true' in said.as_numpy("output")[0]
image_file = np.array([open(sys.argv[2], "rb").read()], object)
assert b'"shape": [4, 8, 3]' in client.infer("describe", tensors(("image", image_file))).as_numpy("output")[0]
rows = client.infer("rows", tensors(("x", np.arange(12, dtype="float32").reshape(4, 3))))
assert (rows.as_numpy("output") == np.arange(12, dtype="float32").reshape(4, 3) * 2).all()
try:
    client.infer("nobody", tensors(("x", np.ones(2))))
    raise SystemExit("no error")
except InferenceServerException as error:
    assert "NOT_FOUND" in error.status() and "there is no model" in error.message()
index = {model.name: model.state for model in client.get_model_repository_index().models}
assert index["echo"] == "READY"
client.unload_model("masks")
assert not client.is_model_ready("masks")
client.load_model("masks")
assert client.is_model_ready("masks")

answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)))
for number in range(5):
    client.async_stream_infer("echo", tensors(("x", np.full(2, number))))
client.async_stream_infer("nobody", tensors(("x", np.ones(2))))
for number in range(5):
    result, error = answers.get(timeout=10)
    assert error is None and result.as_numpy("output")[0] == number
result, error = answers.get(timeout=10)
assert "there is no model" in str(error)
client.stop_stream()


async def main():
    async with triton_aio.InferenceServerClient(address) as client:
        answer = await client.infer("echo", tensors(("x", np.ones(3)), kind=triton_aio))
        assert answer.as_numpy("output").tolist() == [1, 1, 1]


asyncio.run(main())
