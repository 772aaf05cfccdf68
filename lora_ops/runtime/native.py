"""Loads the native library (csrc/) and calls its C ABI; see csrc/include/lora_ops.h.

Wrappers take contiguous CPU tensors that the public functions have checked, and turn status codes into errors.
ctypes releases the GIL while the library runs. The environment variable LORA_OPS_ISA forces an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

# torch comes first: the library then uses the OpenMP runtime, and so the threads, that torch has loaded.
import torch
from torch import Tensor

from lora_ops.runtime.checks import dtype_name

ABI_VERSION = 3
LIBRARY_PATH = Path(__file__).parents[1] / "_liblora_ops.so"
BUILD_HINT = "reinstall lora_ops with a C++17 compiler (LORA_OPS_REQUIRE_NATIVE=1 shows why a build fails)"

ISAS: dict[str, int] = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}
_ISA_AUTO = -1
_NONFINITE, _IO = 2, 5
_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOAT_DTYPES = tuple(_DTYPES)


class NF4Weight(Structure):
    """`lora_ops_nf4_weight`: pointers into tensors, which the caller keeps alive."""

    _fields_ = (
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("absmax_codes", c_void_p),
        ("absmax_map", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_offset", c_float),
        ("block_size", c_int64),
    )

    @functools.cached_property
    def operand(self) -> Weight:
        """It as `lora_forward` and `lora_backward` take it."""
        return Weight(None, 0, self)


class Weight(Structure):
    """`lora_ops_weight`: a pointer into a tensor, which the caller keeps alive, or an NF4 weight."""

    _fields_ = (("dense", c_void_p), ("stride", c_int64), ("nf4", NF4Weight))


class Adapter(Structure):
    """`lora_ops_adapter`: pointers into tensors, which the caller keeps alive."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("a_dtype", c_int),
        ("b_dtype", c_int),
        ("n", c_int64),
        ("k", c_int64),
        ("r", c_int64),
        ("scale", c_float),
        ("threshold", c_uint32),
        ("seed", c_uint64),
        ("offset", c_uint32),
    )


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


_NF4_LINEAR_SHAPE = (c_int64, c_int64, c_void_p, c_int64, c_int64)  # n, k, x, m, stride_x
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lora_ops_get_isa": (),
    "lora_ops_supports_isa": (c_int,),
    "lora_ops_force_isa": (c_int,),
    "lora_ops_nf4_quantize": (c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "lora_ops_nf4_quantize_transposed": (c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "lora_ops_nf4_dequantize": (POINTER(NF4Weight), c_int64, c_int64, c_void_p, c_int, c_int),
    "lora_ops_nf4_dequantize_transposed": (POINTER(NF4Weight), c_int64, c_int64, c_void_p, c_int, c_int),
    "lora_ops_nf4_linear": (POINTER(NF4Weight), *_NF4_LINEAR_SHAPE, c_void_p, c_void_p, c_int64, c_int, c_int),
    "lora_ops_nf4_linear_dx": (POINTER(NF4Weight), *_NF4_LINEAR_SHAPE, c_void_p, c_int64, c_int, c_int),
    "lora_ops_blockwise8_quantize": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int),
    "lora_ops_blockwise8_dequantize": (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "lora_ops_takes_dense": (c_int,),
    "lora_ops_lora_forward": (
        *(POINTER(Adapter), POINTER(Weight), c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
        *(c_int, c_int),
    ),
    "lora_ops_lora_backward": (
        *(POINTER(Adapter), POINTER(Weight), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
        *(c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int),
    ),
    "lora_ops_adamw": (*(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, POINTER(c_uint64), c_int),),
    "lora_ops_adamw_pages": (
        POINTER(PageTable),
        c_void_p,
        c_int64,
        c_void_p,
        c_int64,
        c_void_p,
        c_void_p,
        POINTER(c_uint64),
        c_int,
        POINTER(PageReport),
    ),
    "lora_ops_checksum": (c_void_p, c_int64, POINTER(c_uint64)),
    "lora_ops_dropout_mask": (c_uint64, c_uint32, c_uint32, c_int64, c_int64, c_int64, c_void_p),
}


class NativeError(RuntimeError):
    """The native library is missing, does not fit this package, or refused its arguments."""


def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise NativeError(f"the native library was not built: {BUILD_HINT}")
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.lora_ops_abi_version()
        if version != ABI_VERSION:
            raise NativeError(f"{path.name} has ABI version {version}, expected {ABI_VERSION}: {BUILD_HINT}")
        for name, argtypes in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = argtypes
            function.restype = c_int
        lib.lora_ops_nf4_code.restype = POINTER(c_float * 16)
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path.name} cannot be loaded ({error}): {BUILD_HINT}") from error
    if forced := os.environ.get("LORA_OPS_ISA"):
        _force(lib, forced)
    return lib


def _force(lib: ctypes.CDLL, name: str) -> None:
    supported = _supported(lib)
    if name not in supported:
        raise NativeError(f"instruction set: this machine has {', '.join(supported)}; {name!r} was asked for")
    lib.lora_ops_force_isa(ISAS[name])


def _supported(lib: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for name, number in ISAS.items() if lib.lora_ops_supports_isa(number))


@functools.cache
def _load() -> ctypes.CDLL | NativeError:
    try:
        return _open(LIBRARY_PATH)
    except NativeError as error:
        return error


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeError with the reason if there is none."""
    lib = _load()
    if isinstance(lib, NativeError):
        raise lib
    return lib


def declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native kernels cannot take activations of this device and dtype, or None; for an op's `declines`."""
    if device.type != "cpu":
        return f"native kernels run on cpu, not on {device.type}"
    return None if dtype in _DTYPES else f"native kernels have no {dtype_name(dtype)}"


@functools.cache
def unavailable_reason() -> str | None:
    """Why the native backend cannot be used here, or None."""
    lib = _load()
    return str(lib) if isinstance(lib, NativeError) else None


def available() -> bool:
    """Whether the native backend can be used here."""
    return unavailable_reason() is None


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine and the library have, slowest first."""
    return _supported(library())


def isa() -> str:
    """The instruction set in use."""
    number = library().lora_ops_get_isa()
    return next(name for name, value in ISAS.items() if value == number)


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set, in the whole process, inside the `with` block."""
    lib = library()
    before = isa()
    _force(lib, name)
    try:
        yield
    finally:
        lib.lora_ops_force_isa(ISAS[before])


def nf4_code() -> tuple[float, ...]:
    """The NF4 code book as it stands in C++."""
    return tuple(library().lora_ops_nf4_code().contents)


def _check(status: int, function: str, argument: str) -> None:
    if status == _NONFINITE:
        raise ValueError(f"{argument}: expected finite values, got inf or NaN")
    if status:
        raise NativeError(f"{function}: refused its arguments (status {status})")


# A layer's structures are the same in every call, and to make them takes a tenth of a small layer's time.
_adapter_view = functools.lru_cache(maxsize=1024)(Adapter)
_nf4_view = functools.lru_cache(maxsize=1024)(NF4Weight)


def nf4_weight(packed: Tensor, absmax: Tensor, block_size: int) -> NF4Weight:
    """The C view of an NF4 weight."""
    return _nf4_view(packed.data_ptr(), absmax.data_ptr(), None, None, None, 0.0, block_size)


def nested_nf4_weight(
    packed: Tensor, absmax: Tensor, absmax_map: Tensor, nested_absmax: Tensor, nested_offset: float, block_size: int
) -> NF4Weight:
    """The C view of a double-quantized NF4 weight: absmax holds uint8 codes into absmax_map."""
    pointers = (t.data_ptr() for t in (absmax, absmax_map, nested_absmax))
    return _nf4_view(packed.data_ptr(), None, *pointers, nested_offset, block_size)


def nf4_quantize(w: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize w [n] into packed uint8 [(n + 1) // 2] and absmax fp32 [ceil(n / block_size)]."""
    status = library().lora_ops_nf4_quantize(
        w.data_ptr(),
        _DTYPES[w.dtype],
        w.numel(),
        block_size,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, "nf4_quantize", "w")


def nf4_quantize_transposed(w: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize a weight [N, K] that lies transposed in memory, w [K, N]."""
    k, n = w.shape
    status = library().lora_ops_nf4_quantize_transposed(
        w.data_ptr(), _DTYPES[w.dtype], n, k, block_size, packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads()
    )
    _check(status, "nf4_quantize_transposed", "w")


def nf4_dequantize(weight: NF4Weight, begin: int, end: int, out: Tensor) -> None:
    """Decode elements [begin, end) of the flat weight into out [end - begin]."""
    status = library().lora_ops_nf4_dequantize(
        byref(weight), begin, end, out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads()
    )
    _check(status, "nf4_dequantize", "q")


def nf4_dequantize_transposed(weight: NF4Weight, out: Tensor) -> None:
    """Decode a weight [N, K] into its transpose out [K, N]."""
    k, n = out.shape
    status = library().lora_ops_nf4_dequantize_transposed(
        byref(weight), n, k, out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads()
    )
    _check(status, "nf4_dequantize_transposed", "q")


def nf4_linear(weight: NF4Weight, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = x [M, K] Wᵀ + bias [N]; x and y have unit stride along their last dimension."""
    status = library().lora_ops_nf4_linear(
        byref(weight),
        y.shape[1],
        x.shape[1],
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        _DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    _check(status, "nf4_linear", "x")


def nf4_linear_dx(weight: NF4Weight, dy: Tensor, dx: Tensor) -> None:
    """dx [M, K] = dy [M, N] W; dy and dx have unit stride along their last dimension."""
    status = library().lora_ops_nf4_linear_dx(
        byref(weight),
        dy.shape[1],
        dx.shape[1],
        dy.data_ptr(),
        dy.shape[0],
        dy.stride(0),
        dx.data_ptr(),
        dx.stride(0),
        _DTYPES[dy.dtype],
        torch.get_num_threads(),
    )
    _check(status, "nf4_linear_dx", "dy")


def blockwise8_quantize(x: Tensor, block_size: int, code_map: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Quantize x fp32 [n] into codes uint8 [n] and absmax fp32 [ceil(n / block_size)]; code_map fp32 [256] ascends."""
    status = library().lora_ops_blockwise8_quantize(
        x.data_ptr(),
        x.numel(),
        block_size,
        code_map.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, "blockwise8_quantize", "x")


def blockwise8_dequantize(codes: Tensor, absmax: Tensor, block_size: int, code_map: Tensor, out: Tensor) -> None:
    """Decode codes uint8 [n] with absmax fp32 [ceil(n / block_size)] into out fp32 [n]."""
    status = library().lora_ops_blockwise8_dequantize(
        codes.data_ptr(),
        absmax.data_ptr(),
        codes.numel(),
        block_size,
        code_map.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, "blockwise8_dequantize", "codes")


def adapter(
    lora_a: Tensor, lora_b: Tensor, scale: float, threshold: int = 0, seed: int = 0, offset: int = 0
) -> Adapter:
    """The C view of an adapter: lora_a [R, K] and lora_b [N, R], both contiguous, and its dropout."""
    (n, r), k = lora_b.shape, lora_a.shape[1]
    pointers = lora_a.data_ptr(), lora_b.data_ptr(), _DTYPES[lora_a.dtype], _DTYPES[lora_b.dtype]
    if not threshold:
        return _adapter_view(*pointers, n, k, r, scale)
    return Adapter(*pointers, n, k, r, scale, threshold, seed & (2**64 - 1), offset)


def takes_dense(dtype: torch.dtype) -> bool:
    """Whether `lora_forward` and `lora_backward` take dense weights of this dtype with the instruction set in use."""
    return bool(library().lora_ops_takes_dense(_DTYPES[dtype]))


def dense_weight(weight: Tensor) -> Weight:
    """The C view of a dense weight [N, K] with unit stride along K."""
    return Weight(weight.data_ptr(), weight.stride(0), NF4Weight())


def lora_forward(
    low_rank: Adapter, x: Tensor, s: Tensor, y: Tensor, weight: Weight | None = None, bias: Tensor | None = None
) -> None:
    """s fp32 [M, R] = drop(x) Aᵀ and y [M, N] = x Wᵀ + bias + scale · s Bᵀ.

    Without a weight y holds x Wᵀ + bias already. x and y have unit stride along their last dimension.
    """
    status = library().lora_ops_lora_forward(
        byref(low_rank),
        None if weight is None else byref(weight),
        _pointer(bias),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        s.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        _DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    _check(status, "lora_forward", "x")


def lora_backward(
    low_rank: Adapter,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Weight | None = None,
    *,
    dx: Tensor | None = None,
    dlora_a: Tensor | None = None,
    dlora_b: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """With dS = scale · dY B: dx = dY W + drop(dS A), dlora_a = dSᵀ drop(x), dlora_b = scale · dYᵀ s, dbias = Σ_m dY.

    Without a weight dx holds dY W already. Outputs that are None are not computed. dy, x and dx have unit stride along
    their last dimension; the others are contiguous.
    """
    status = library().lora_ops_lora_backward(
        byref(low_rank),
        None if weight is None else byref(weight),
        dy.data_ptr(),
        dy.shape[0],
        dy.stride(0),
        _pointer(x),
        0 if x is None else x.stride(0),
        _pointer(s),
        _pointer(dx),
        0 if dx is None else dx.stride(0),
        _pointer(dlora_a),
        _pointer(dlora_b),
        _pointer(dbias),
        _DTYPES[dy.dtype],
        torch.get_num_threads(),
    )
    _check(status, "lora_backward", "dy")


def dropout_mask(rows: slice, k: int, threshold: int, seed: int, offset: int, bits: Tensor) -> None:
    """Bits of the rows of a mask: bits uint8 [rows, ceil(k / 8)], the lowest bit of a byte first."""
    n_rows = rows.stop - rows.start
    status = library().lora_ops_dropout_mask(
        seed & (2**64 - 1), offset, threshold, rows.start, n_rows, k, bits.data_ptr()
    )
    _check(status, "dropout_mask", "rows")


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
    status = library().lora_ops_adamw(*_adamw_arguments(fields, count, constants, signed_map, unsigned_map, seed))
    _check(status, "adamw", "slices")


def _adamw_arguments(
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
    arguments = _adamw_arguments(fields, count, constants, signed_map, unsigned_map, seed)
    status = library().lora_ops_adamw_pages(byref(table), *arguments, byref(report))
    if status != _IO:
        _check(status, "adamw_pages", "slices")
    return report


def checksum(pointer: int, n: int) -> int:
    """The 64-bit checksum of n bytes that lora_ops/paging/checksum.py defines."""
    found = c_uint64()
    _check(library().lora_ops_checksum(pointer, n, byref(found)), "checksum", "bytes")
    return found.value


def dtype_number(dtype: torch.dtype) -> int:
    """The lora_ops_dtype of a dtype among FLOAT_DTYPES."""
    return _DTYPES[dtype]


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
