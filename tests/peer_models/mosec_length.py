"""The length of a body on mosec, and the same with batches: ``--address HOST --port PORT``."""

import time

from mosec import Runtime, Server, Worker


class Length(Worker):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> int:
        return len(data)


class Light(Length):
    def forward(self, data: list[bytes]) -> list[int]:  # type: ignore[override]
        time.sleep((2 + 0.1 * len(data)) / 1000)
        return [len(item) for item in data]


if __name__ == "__main__":
    server = Server()
    light = Runtime(Light, num=1, max_batch_size=32)
    server.register_runtime({"/inference": [Runtime(Length, num=2)], "/light": [light]})
    server.run()
