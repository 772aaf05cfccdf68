"""Triton's interpreter made faithful and watched: right bf16 and tf32, every address checked, every byte counted.

Importable only with TRITON_INTERPRET=1. `install()` patches the interpreter once:

- bf16, which the interpreter keeps as uint16: casts round to nearest even instead of truncating, arithmetic and
  `tl.dot` compute with the values instead of the bit patterns. Operands of a tf32 dot lose 13 bits as on the chip.
- Each unmasked lane of a load or store must lie inside one of the launch's tensors, so a wrong mask at a ragged edge
  fails even where the value that it reads is thrown away. Atomics are refused: results are bitwise repeatable.

`count_traffic()` counts bytes and launches; `run_virtually()` runs single programs of a launch too large for memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

from lora_ops.runtime.triton_launch import Launch, interpreting, launch_under_way

if not interpreting():
    raise RuntimeError("tests.gpu_proof.interpreter: set TRITON_INTERPRET=1 before triton is imported")

_Builder = ti.InterpreterBuilder
_ORIGINALS: dict[str, Callable] = {}


# bf16 and tf32 as the chip computes them.


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns (uint16), to nearest even."""
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    return from_bf16_bits(handle.data) if _is_bf16(handle) else handle.data


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    dst = dst_type.scalar
    if src.dtype.scalar == dst or not (_is_bf16(src) or dst == tl.bfloat16):
        return _ORIGINALS["cast_impl"](self, src, dst_type)
    values = _values(src)
    data = to_bf16_bits(values) if dst == tl.bfloat16 else values.astype(ti._get_np_dtype(dst_type))
    return ti.TensorHandle(data, dst)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if {src.dtype.scalar, dst_type.scalar} <= {tl.bfloat16, tl.float16, tl.float32}:
        return _cast(self, src, dst_type)
    return _ORIGINALS["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
    if not (_is_bf16(lhs) and _is_bf16(rhs)):
        return _ORIGINALS["binary_op"](self, lhs, rhs, op)
    out = op(_values(lhs), _values(rhs))
    return ti.TensorHandle(out if out.dtype == np.bool_ else to_bf16_bits(out), tl.bfloat16)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    operands = [_values(a), _values(b)]
    if all(v.dtype == np.float32 for v in operands) and not (_is_bf16(a) or _is_bf16(b)):
        if input_precision == ti._ir.INPUT_PRECISION.TF32:
            operands = [_to_tf32(v) for v in operands]
    elif any(v.dtype.kind == "u" for v in operands):
        return _ORIGINALS["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(*operands, dtype=d.data.dtype)
    return ti.TensorHandle(product + d.data, d.dtype.scalar)


def _get_bf16(self: Any, value: float) -> Any:
    return ti.TensorHandle(to_bf16_bits(np.array([value])), tl.bfloat16)


def _patch_lang_tensor(tensor: Any, *scope: Any) -> Any:
    result = _ORIGINALS["_patch_lang_tensor"](tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    return result


# Memory: what each launch may touch, and what it did.


@dataclass
class KernelTraffic:
    """Bytes that one kernel moved, lane by lane: an element loaded twice counts twice.

    A launch argument called `…table_ptr` is a look-up table of at most 4 KiB, which L1 holds: it counts once a launch.
    `distinct` counts each byte once a launch, loaded and stored apart: what reaches memory if L2 serves every repeat.
    It stays 0 unless `count_traffic(distinct=True)`.
    """

    launches: int = 0
    loaded: int = 0
    stored: int = 0
    distinct: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@dataclass
class Traffic:
    """What `count_traffic` saw, by kernel name."""

    kernels: dict[str, KernelTraffic] = field(default_factory=dict)
    with_distinct: bool = False

    @property
    def launches(self) -> int:
        return sum(k.launches for k in self.kernels.values())

    @property
    def loaded(self) -> int:
        return sum(k.loaded for k in self.kernels.values())

    @property
    def stored(self) -> int:
        return sum(k.stored for k in self.kernels.values())

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    def __str__(self) -> str:
        return "\n".join(
            f"{k.launches:>4} × {name:<40} {k.loaded:>12} B loaded {k.stored:>12} B stored"
            for name, k in self.kernels.items()
        )


@dataclass
class _Frame:
    """The launch in progress: its tensors as [begin, end) addresses, and whether memory is only pretended."""

    kernel: str
    begins: np.ndarray
    ends: np.ndarray
    names: list[str]
    virtual: bool = False
    tables: tuple[tuple[int, int], ...] = ()
    seen: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # bytes touched, by kind and tensor
    real: tuple[tuple[int, int], ...] = ()  # tensors of a virtual launch that exist


MAX_TABLE = 4096
_frames: list[_Frame] = []
_counters: list[Traffic] = []


class OutOfBounds(IndexError):
    """A kernel touched memory outside the tensors that it was given."""


class AtomicUsed(RuntimeError):
    """A kernel used an atomic: its result would depend on the order of the programs."""


@contextmanager
def count_traffic(*, distinct: bool = False) -> Iterator[Traffic]:
    """Count the bytes and launches of every kernel while the context is open; `distinct` costs time and memory.

    least = x.nbytes + y.nbytes
    with count_traffic() as t:
        op(x)
    assert t.total <= 1.05 * least
    """
    traffic = Traffic(with_distinct=distinct)
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters[:] = [t for t in _counters if t is not traffic]


def _span(t: Any) -> tuple[int, int]:
    """First and last address + 1 of a tensor's elements."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _tensors(args: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, arg in args.items():
        if isinstance(arg, (tuple, list)):
            yield from _tensors({f"{name}[{i}]": a for i, a in enumerate(arg)})
        elif hasattr(arg, "base") and hasattr(arg, "block_shape"):  # a TensorDescriptor
            yield name, arg.base
        elif hasattr(arg, "data_ptr"):
            yield name, getattr(arg, "base", arg)


def _frame(kernel: str, tensors: Sequence[tuple[str, tuple[int, int]]], *, virtual: bool = False) -> _Frame:
    ordered = sorted(tensors, key=lambda item: item[1])
    begins, ends = (np.array([span[i] for _, span in ordered], dtype=np.uint64) for i in range(2))
    # Views of one storage overlap: an address may lie in any tensor that begins before it.
    ends = np.maximum.accumulate(ends) if len(ends) else ends
    tables = tuple(span for name, span in ordered if name.endswith("table_ptr"))
    if large := [name for name, (begin, end) in ordered if name.endswith("table_ptr") and end - begin > MAX_TABLE]:
        raise ValueError(f"{kernel}: {', '.join(large)} is larger than a table that L1 holds ({MAX_TABLE} bytes)")
    return _Frame(kernel, begins, ends, [n for n, _ in ordered], virtual, tables)


def _access(kind: str, ptrs: Any, mask: np.ndarray) -> None:
    frame = _frames[-1]
    size = ti._get_np_dtype(ptrs.get_element_ty()).itemsize
    addresses = np.asarray(ptrs.data)[np.broadcast_to(mask, np.shape(ptrs.data)).astype(bool)]
    if addresses.size:
        i = np.searchsorted(frame.begins, addresses, side="right").astype(np.int64) - 1
        outside = (i < 0) | (addresses + np.uint64(size) > frame.ends[np.maximum(i, 0)])
        if outside.any():
            _report(frame, kind, int(addresses[outside][0]), int(outside.sum()), int(i[outside][0]), size)
    for traffic in _counters:
        k = traffic.kernels.setdefault(frame.kernel, KernelTraffic())
        if kind == "load":
            from_table = any(begin <= addresses[0] < end for begin, end in frame.tables) if addresses.size else False
            k.loaded += 0 if from_table else addresses.size * size
        else:
            k.stored += addresses.size * size
        if traffic.with_distinct and addresses.size:
            k.distinct += _mark(frame, kind, addresses, size)


def _mark(frame: _Frame, kind: str, addresses: np.ndarray, size: int) -> int:
    """Note what one access of a tensor touches, and answer how many bytes of it are new to this launch."""
    i = int(np.searchsorted(frame.begins, addresses[0], side="right")) - 1
    begin = frame.begins[i]
    if (kind, i) not in frame.seen:
        frame.seen[kind, i] = np.zeros(int(frame.ends[i] - begin) // size + 1, dtype=bool)
    at = ((addresses - begin) // np.uint64(size)).astype(np.int64)
    reach = frame.seen[kind, i][at.min() : at.max() + 1]
    before = np.count_nonzero(reach)
    reach[at - at.min()] = True
    return int(np.count_nonzero(reach) - before) * size


def _report(frame: _Frame, kind: str, address: int, lanes: int, i: int, size: int) -> None:
    where = "before every tensor"
    if i >= 0:
        where = f"{address - int(frame.ends[i])} bytes past the end of {frame.names[i]}"
    program = ti.interpreter_builder.grid_idx
    raise OutOfBounds(
        f"{frame.kernel}, program {program}: {kind} of {lanes} lanes ({size} B each) out of bounds, {where}"
    )


def _masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
    _access("load", ptrs, mask.data)
    address = int(np.asarray(ptrs.data).flat[0])
    if not _frames[-1].virtual or any(begin <= address < end for begin, end in _frames[-1].real):
        return _ORIGINALS["create_masked_load"](self, ptrs, mask, other, *rest, **kwargs)
    dtype = ptrs.get_element_ty()
    zeros = np.zeros(np.shape(ptrs.data), dtype=ti._get_np_dtype(dtype))
    return ti.TensorHandle(zeros if other is None else np.where(mask.data, zeros, other.data), dtype)


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
    _access("store", ptrs, mask.data)
    if _frames[-1].virtual:
        return None
    return _ORIGINALS["create_masked_store"](self, ptrs, value, mask, *rest, **kwargs)


def _no_atomics(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AtomicUsed(f"{_frames[-1].kernel}: atomics are not allowed, results are bitwise repeatable")


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
    name = self.fn.__name__
    call = launch_under_way()
    reached = {} if call is None else {f"reached[{i}]": t for i, t in enumerate(call.reaches)}
    _frames.append(_frame(name, [(n, _span(t)) for n, t in _tensors({**bound, **reached})]))
    for traffic in _counters:
        k = traffic.kernels.setdefault(name, KernelTraffic())
        k.launches += 1
        k.loaded += sum(end - begin for begin, end in _frames[-1].tables)
    try:
        return _ORIGINALS["__call__"](self, *args, **kwargs)
    except ti.InterpreterError as e:
        # A device function may wrap the error of another; what the harness found matters, not where it surfaced.
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, (OutOfBounds, AtomicUsed)):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        _frames.pop()


# Launches larger than memory.


@dataclass(frozen=True)
class _Pointer:
    """Stands for a tensor at an address that nothing lies behind."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _sparse_range(first: Any, end: Any = None, step: Any = 1, **options: Any) -> Iterator[int]:
    """The first two, the middle and the last two steps of a loop: its addresses lie between theirs."""
    steps = range(first) if end is None else range(first, end, step)
    chosen = range(len(steps)) if len(steps) <= 8 else (0, 1, len(steps) // 2, len(steps) - 2, len(steps) - 1)
    return (steps[i] for i in chosen)


def _functions(fn: Any, seen: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The globals of a kernel and of every device function within its reach."""
    if id(fn.__globals__) not in seen:
        seen[id(fn.__globals__)] = fn.__globals__
        for value in list(fn.__globals__.values()):
            if isinstance(value, ti.InterpretedFunction):
                _functions(value.fn, seen)
    return seen


def run_virtually(
    launch: Launch, programs: Sequence[tuple[int, ...]] | None = None, reaches: Sequence[tuple[int, int]] = ()
) -> None:
    """Run programs of a recorded launch (first, middle and last if None) on pretended memory and check every address.

    Loads yield 0, and of a long loop five steps are run. Integers wrap as on the chip, so int32 offsets that overflow
    land outside of every tensor. Arguments on the CPU are what they are: a table of addresses is read, and `reaches`
    are the [begin, end) that it tells of.
    """
    fn = launch.kernel.rewrite()
    executor = ti.GridExecutor(fn, launch.kernel.arg_names, launch.grid)
    grid = (*launch.grid, 1, 1)[:3]
    if programs is None:
        programs = [(0, 0, 0), tuple(g // 2 for g in grid), tuple(g - 1 for g in grid)]
    spans: list[tuple[str, tuple[int, int]]] = [(f"reached[{i}]", span) for i, span in enumerate(reaches)]
    real: list[tuple[int, int]] = []

    def stand_in(name: str, arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(stand_in(f"{name}[{i}]", a) for i, a in enumerate(arg))
        if not isinstance(arg, torch.Tensor):
            return arg
        if arg.device.type == "cpu":
            spans.append((name, _span(arg)))
            real.append(_span(arg))
            return arg
        begin = (len(spans) + 1) << 48  # far apart: an overflow of one tensor does not end up in the next
        first, end = _span(arg)
        spans.append((name, (begin, begin + end - first)))
        return _Pointer(begin, arg.dtype)

    meta = {k: v for k, v in launch.meta.items() if k in launch.kernel.arg_names}
    bound = {n: stand_in(n, a) for n, a in inspect.getcallargs(fn, *launch.args, **meta).items()}
    scope = ti._patch_lang(fn)
    scope.set_attr(tl, "range", _sparse_range)
    modules = list(_functions(fn, {}).values())
    for names in modules:
        names["range"] = _sparse_range
    _frames.append(_frame(fn.__name__, spans, virtual=True))
    _frames[-1].real = tuple(real)
    try:
        args = {n: a if n in executor.constexprs else ti._implicit_cvt(a) for n, a in bound.items()}
        ti.interpreter_builder.set_grid_dim(*grid)
        for program in programs:
            ti.interpreter_builder.set_grid_idx(*(*program, 0, 0)[:3])
            with np.errstate(all="ignore"):
                fn(**args)
    except ti.InterpreterError as e:
        raise e.__cause__ or e from None
    finally:
        _frames.pop()
        for names in modules:
            del names["range"]
        scope.restore()


_PATCHES: tuple[tuple[Any, str, Callable], ...] = (
    (_Builder, "cast_impl", _cast),
    (_Builder, "create_fp_to_fp", _fp_to_fp),
    (_Builder, "binary_op", _binary_op),
    (_Builder, "create_dot", _dot),
    (_Builder, "get_bf16", _get_bf16),  # Triton 3.6 has none
    (ti, "_patch_lang_tensor", _patch_lang_tensor),  # Triton 3.6 converts 1-element arrays, which numpy 2.4 refuses
    (_Builder, "create_masked_load", _masked_load),
    (_Builder, "create_masked_store", _masked_store),
    (_Builder, "create_atomic_rmw", _no_atomics),
    (_Builder, "create_atomic_cas", _no_atomics),
    (ti.GridExecutor, "__call__", _call),
)


def install() -> None:
    """Apply the patches, once."""
    if _ORIGINALS:
        return
    for owner, name, patch in _PATCHES:
        _ORIGINALS[name] = getattr(owner, name, patch)
        setattr(owner, name, patch)


@contextmanager
def uninstalled() -> Iterator[None]:
    """Triton's own interpreter, for the test that the patches are still needed."""
    for owner, name, _ in _PATCHES:
        setattr(owner, name, _ORIGINALS[name])
    try:
        yield
    finally:
        for owner, name, patch in _PATCHES:
            setattr(owner, name, patch)
