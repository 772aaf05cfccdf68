"""Pages as the native library takes them: csrc/include/lora_ops.h."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int64, c_uint64, c_void_p

from lora_ops.runtime import native

IO_FAILED = 5  # a status: the PageReport tells what


class PageTable(Structure):
    """`lora_ops_page_table`: pointers into arrays, which the caller keeps alive."""

    _fields_ = (
        ("fd", c_int64),
        ("extent_bytes", c_int64),
        ("frames", c_void_p),
        ("n_frames", c_int64),
        ("pages", c_void_p),
        ("n_pages", c_int64),
        ("order", c_void_p),
        ("n_order", c_int64),
        ("spare", c_void_p),
        ("n_spare", c_int64),
    )


class PageReport(Structure):
    """`lora_ops_page_report`; `failure` is 0 or one of IO_READ, IO_WRITE, IO_TRUNCATED and IO_CHECKSUM."""

    IO_READ, IO_WRITE, IO_TRUNCATED, IO_CHECKSUM = 1, 2, 3, 4
    _fields_ = (
        ("bytes_read", c_int64),
        ("bytes_written", c_int64),
        ("read_ns", c_int64),
        ("write_ns", c_int64),
        ("failure", c_int64),
        ("failed_extent", c_int64),
        ("failed_byte", c_int64),
        ("failed_errno", c_int64),
    )


_CHECKSUM = native.Function("checksum", c_void_p, c_int64, POINTER(c_uint64), argument="bytes")


def checksum(pointer: int, n: int) -> int:
    """The 64-bit checksum of n bytes that checksum.py defines."""
    found = c_uint64()
    _CHECKSUM(pointer, n, byref(found))
    return found.value
