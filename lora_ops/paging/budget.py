"""Byte budgets, and the size of the extents that they are cut into."""

from __future__ import annotations

import re

MIN_EXTENT = 64 << 10
# From 2 MiB on a copy to a device has its full bandwidth. On the CPU an extent that stays in the second-level cache
# between its transfers and its update makes a step cheaper: 16.7 ms with 512 KiB, 20.6 with 4 MiB (2 cores of a Zen 4).
MAX_EXTENT = {"cpu": 512 << 10, "cuda": 16 << 20}
PAGE = 4096  # the file's and the kernel's unit
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}  # fmt: skip


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes from an integer or a string such as "2GiB" or "500 MB".

    Raises:
        ValueError: if it is neither or not positive.
    """
    wanted = f"{name}: expected bytes or a string such as '2GiB' or '500MB', got {value!r}"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(wanted)
        number = int(float(match[1]) * unit)
    elif isinstance(value, bytes):
        raise ValueError(wanted)
    else:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):  # NaN, inf, a list
            raise ValueError(wanted) from None
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number of bytes, got {value!r}")
    return number


def choose_extent_bytes(page_budget: int, device: str = "cpu") -> int:
    """An eighth of the budget, as a power of two from 64 KiB to 512 KiB on the CPU, to 16 MiB on CUDA."""
    size = MAX_EXTENT[device]
    while size > MIN_EXTENT and size > page_budget // 8:
        size //= 2
    return size


def check_extents(page_budget: int, extent_bytes: int) -> None:
    """Raise ValueError unless extents are whole pages and at least two of them fit the budget."""
    if not isinstance(extent_bytes, int) or extent_bytes < PAGE or extent_bytes % PAGE:
        raise ValueError(f"extent_bytes: expected a multiple of {PAGE}, got {extent_bytes!r}")
    if page_budget < 2 * extent_bytes:
        raise ValueError(
            f"page_budget: expected at least {2 * extent_bytes} bytes, two extents of {extent_bytes}, got {page_budget}"
        )
