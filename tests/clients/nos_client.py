"""autonomi-nos' InferenceClient, without the rest of its package (torch, ray). Argument: address."""

import importlib.util
import pickle
import sys
import types

import numpy as np
from PIL import Image

package = types.ModuleType("nos")
package.__path__ = list(importlib.util.find_spec("nos").submodule_search_locations)
sys.modules["nos"] = package
from nos.client import InferenceClient, NosClientException  # noqa: E402
from nos.client.grpc import InferenceSession  # noqa: E402

client = pickle.loads(pickle.dumps(InferenceClient(sys.argv[1])))
assert {"means", "boxes", "lengths", "paint"} <= set(client.ListModels())
pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
with InferenceSession(client.stub, "means", num_replicas=2):
    for image in (pixels, Image.fromarray(pixels), np.asfortranarray(pixels)):
        answer = client.Predict(method="img2vec", model_name="means", img=image)
        assert np.allclose(answer["embedding"], pixels.mean((0, 1))), answer
    answer = client.Predict(method="img2vec", model_name="means", img=[Image.fromarray(pixels), pixels])
    assert answer["embedding"].shape == (2, 3)
Image.fromarray(pixels).save(sys.argv[2])
opened = Image.open(sys.argv[2])
answer = client.Predict(method="img2bbox", model_name="boxes", img=opened)
assert answer["labels"] == ["whole"], answer
assert answer["bboxes"].tolist() == [[0, 0, 4, 3]], answer
assert client.Predict(method="txt2vec", model_name="lengths", text="four")["embedding"].tolist() == [4.0]
assert client.Predict(method="txt2img", model_name="paint", text="7")["image"].shape == (2, 2, 3)
for method, model, status in [("img2vec", "nobody", "NOT_FOUND"), ("img2bbox", "means", "INVALID_ARGUMENT")]:
    try:
        client.Predict(method=method, model_name=model, img=pixels)
        raise SystemExit("no error")
    except NosClientException as error:
        assert f"StatusCode.{status}" in str(error), error
