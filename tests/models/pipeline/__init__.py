"""Two models one after the other."""

from model_interface import Pipeline


class Model(Pipeline):
    stages = ["stage_decode", "stage_double"]
