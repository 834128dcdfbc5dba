"""The process's own random streams as an object that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """The global streams of Python, NumPy, torch on the CPU and the current CUDA device, with `state_dict`.

    What is loaded by a `Loader`, and what a model draws inside of `accumulate`, is keyed by the micro-batch and needs
    none of this. It is for a script's own draws between steps, which go on where they were.

    The file has rank 0's streams, and every rank continues with them, on any world size: between steps the streams are
    the same on every rank, unless ranks drew unequally often. Without a GPU in use, or where the file has no such
    stream, CUDA's is left as it is.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        return {
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
