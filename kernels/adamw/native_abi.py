"""AdamW's kernels of the native library: csrc/include/lora_ops.h."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lora_ops.paging.native_abi import IO_FAILED, PageReport, PageTable
from lora_ops.runtime import native

_STEP = c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, POINTER(c_uint64), c_int
_ADAMW = native.Function("adamw", *_STEP, argument="slices")
_ADAMW_PAGES = native.Function("adamw_pages", POINTER(PageTable), *_STEP, POINTER(PageReport), argument="slices")


def adamw(
    slices: Sequence[tuple[int, ...]], constants: Tensor, signed_map: Tensor, unsigned_map: Tensor, seed: int | None
) -> None:
    """One AdamW step of many slices: each the 13 fields of lora_ops_adamw_slice; constants fp32 [rows, 8]."""
    fields = (c_int64 * (13 * len(slices)))(*itertools.chain.from_iterable(slices))
    adamw_fields(fields, len(slices), constants, signed_map, unsigned_map, seed)


def adamw_fields(
    fields: Any, count: int, constants: Tensor, signed_map: Tensor, unsigned_map: Tensor, seed: int | None
) -> None:
    """`adamw` of `count` slices that lie in memory already; fields is their address or a ctypes array."""
    _ADAMW(*_arguments(fields, count, constants, signed_map, unsigned_map, seed))


def _arguments(
    fields: Any, count: int, constants: Tensor, signed_map: Tensor, unsigned_map: Tensor, seed: int | None
) -> tuple[Any, ...]:
    pointers = constants.data_ptr(), constants.shape[0], signed_map.data_ptr(), unsigned_map.data_ptr()
    seed_pointer = None if seed is None else byref(c_uint64(seed & (2**64 - 1)))
    return fields, count, *pointers, seed_pointer, torch.get_num_threads()


def adamw_pages(
    table: PageTable,
    fields: Any,
    count: int,
    constants: Tensor,
    signed_map: Tensor,
    unsigned_map: Tensor,
    seed: int | None,
) -> PageReport:
    """`adamw_fields` of slices whose states are in extents of a file, at offsets in them; tells what was moved.

    A file that cannot be read or written is no exception: the report tells.
    """
    report = PageReport()
    arguments = _arguments(fields, count, constants, signed_map, unsigned_map, seed)
    status = _ADAMW_PAGES.ask(byref(table), *arguments, byref(report))
    if status != IO_FAILED:
        _ADAMW_PAGES.check(status)
    return report
