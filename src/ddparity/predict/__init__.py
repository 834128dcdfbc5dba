"""Distributed inference: the batches of one process, shared out whole, each sample once and in order."""

from .predict import Predictor, predict
from .reading import read_predictions

__all__ = ["Predictor", "predict", "read_predictions"]
