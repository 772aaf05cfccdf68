"""The page table: where each extent is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Page:
    """A row of the page table: an extent that neither a frame nor the tier holds is zeros."""

    frame: Tensor | None = None
    dirty: bool = False  # the frame holds what the tier does not
    stored: bool = False  # the tier holds it
