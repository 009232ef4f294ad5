"""Starts the server, sends it real photographs and texts through ModelClient, prints the answers, and stops it.

Run as ``make run``. With TMS_ADDRESS set, it uses the server there instead.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_sample_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402


def main() -> None:
    """Calls every example model once."""
    if "TMS_ADDRESS" in os.environ:
        return call_models()
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "socket"  # at a port there may be another server, whose answers would be taken for ours
        flags = ["--socket", str(socket), "--port", "0", "--http-port", "off", "--log-level", "warning"]
        print("Starting the server (python server.py) on a socket of its own ...")
        server = subprocess.Popen([sys.executable, "server.py", *flags], cwd=ROOT)
        try:
            while not socket.exists():
                if server.poll() is not None:
                    sys.exit("the server has ended; the lines above say why")
                time.sleep(0.05)
            os.environ["TMS_ADDRESS"] = f"unix:{socket}"
            call_models()
        finally:
            server.terminate()
            server.wait()


def call_models() -> None:
    """Sends each model real data, and prints its answer."""
    flower = load_sample_images().images[1]

    example = ModelClient("example", connect_timeout=120)
    started = time.perf_counter()
    models = example.list_models()
    print("models:  ", ", ".join(f"{model['name']} {model['state']}" for model in models))
    print(f"           (ready after {time.perf_counter() - started:.1f} s)")
    print("example: ", example.run_image(flower, {"bins": 4}))

    digits = load_digits().images[:8] / 16
    ready = {model["name"] for model in models if model["state"] == "READY"}
    for model in models:
        if model["name"] not in ready:  # some packages may be missing for the newest Python
            print(f"{model['name']}:".ljust(10), f"is left out: {model['reason']}")
    for name in sorted(ready & {"digits", "digits_onnx"}):
        answers = ModelClient(name).run_image_batch(list(digits))
        print(f"{name}:".ljust(10), "read", [answer["digit"] for answer in answers], "of 0 1 2 3 4 5 6 7")

    edges = ModelClient("edges").run_image_to_image(flower)
    print(
        "edges:   ",
        f"{edges.shape} {edges.dtype}, {100 * (edges > 0).mean():.1f} % of the flower's pixels are contours",
    )

    flow = ModelClient("optical_flow").run([flower[:, :-5], flower[:, 5:]])
    moved = np.median(flow[..., 0])
    print("flow:    ", f"{flow.shape} {flow.dtype}, the median pixel moved {moved:.1f} px sideways, where -5 is right")

    languages = ModelClient("language").run_text_batch(["Where is the station?", "Wo ist der Bahnhof?", "¿Dónde está?"])
    print("language:", [answer[0]["language"] for answer in languages])

    if "ocr" in ready:
        import skimage.data

        print("ocr:      page.png, read as a file that the server decodes:")
        for line in ModelClient("ocr").run_image(Path(skimage.data.__file__).parent / "page.png"):
            print(f"           {line['score']:.2f}  {line['text']}")


if __name__ == "__main__":
    main()
