"""Answers an image beside other things."""

from model_interface import ModelInterface


class Model(ModelInterface):
    image_mode = "gray"

    def run(self, data, args):
        return (
            {"image": (data > 127).astype("uint8"), "found": int((data > 127).sum())}
            if args.get("mask")
            else "no image"
        )
