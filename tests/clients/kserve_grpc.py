"""KServe's InferenceGRPCClient. Argument: address."""

import asyncio
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest


async def main():
    async with InferenceGRPCClient(sys.argv[1]) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("echo")
        for dtype, datatype in [("float32", "FP32"), ("uint8", "UINT8"), ("int64", "INT64"), ("float16", "FP16")]:
            array = np.arange(12).reshape(3, 4).astype(dtype)
            for as_bytes in [True] if dtype == "float16" else [True, False]:
                tensor = InferInput("x", list(array.shape), datatype)
                tensor.set_data_from_numpy(array, binary_data=as_bytes)
                answer = await client.infer(InferRequest(model_name="echo", infer_inputs=[tensor], request_id="7"))
                assert answer.id == "7"
                found = answer.outputs[0].as_numpy()
                assert (found.reshape(3, 4) == array).all(), (dtype, as_bytes)
        text = InferInput("text", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"hello"], object), binary_data=True)
        answer = await client.infer(InferRequest(model_name="echo", infer_inputs=[text], parameters={"n": 3}))
        assert b'"n": 3' in answer.outputs[0].as_numpy()[0], answer
        try:
            await client.infer(InferRequest(model_name="nobody", infer_inputs=[tensor]))
            raise SystemExit("no error")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND


asyncio.run(main())
