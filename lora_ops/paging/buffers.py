"""Tensors as bytes, for files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bytes_of(t: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory if it is contiguous and on the CPU, else a copy's."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_all(file: Any, view: memoryview) -> None:
    """Write a whole buffer to an unbuffered file, however many calls it takes."""
    while view:
        view = view[file.write(view) :]
