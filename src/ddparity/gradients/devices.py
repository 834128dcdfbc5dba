"""What the bits of a computation depend on besides the program: kernels, the device and the software."""

from __future__ import annotations

import contextlib
import os
import socket
from contextlib import AbstractContextManager

import torch

from ..system import processor
from .strict import deterministic


def repeatable(device: torch.device | None) -> AbstractContextManager[None]:
    """Return a context with deterministic kernels where torch has them, on an accelerator or with several threads.

    In the strict mode they are asked for already.
    """
    asked = torch.get_deterministic_debug_mode() > 0
    return contextlib.nullcontext() if asked else deterministic(device, otherwise="warn")


def computer_of(device: torch.device) -> str:
    """Return what bits depend on besides the program: the kind of the device, torch, and its threads."""
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)} {torch.version.cuda}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        kind = f"{device.type}, {processor()}, {capability}, {torch.get_num_threads()} threads"
    return f"{kind}, torch {torch.__version__}"


def place_of(device: torch.device) -> dict[str, str]:
    """Return the host and the device of this process, by which somebody finds it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text = f"{device} ({properties.name}, UUID {getattr(properties, 'uuid', 'unknown')})"
    else:
        text = f"{device.type} ({processor()}, process {os.getpid()})"
    return {"host": socket.gethostname(), "device": text}
