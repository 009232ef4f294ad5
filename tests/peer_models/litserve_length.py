"""The length of a form's file on LitServe: ``--port PORT``."""

import sys
from typing import Any

import litserve
from fastapi import Request


class Length(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: Request) -> bytes:
        data: bytes = request["data"].file.read()
        return data

    def predict(self, data: bytes) -> int:
        return len(data)

    def encode_response(self, length: int) -> dict[str, Any]:
        return {"length": length}


if __name__ == "__main__":
    server = litserve.LitServer(Length(api_path="/inference"), accelerator="cpu", workers_per_device=2)
    server.run(port=int(sys.argv[2]), generate_client_file=False, log_level="warning", timeout_keep_alive=60)
