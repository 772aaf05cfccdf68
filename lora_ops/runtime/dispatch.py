"""Which backend runs an op: the table, the choice, the reasons, and the trace that tells what ran.

PyTorch's dispatcher is the registry of ops; each op has one kernel there, which calls `Op.run`. The choice between
backends is made inside it, at run time, so that it neither breaks nor re-traces a compiled graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled

from lora_ops.runtime import cuda, native
from lora_ops.runtime.checks import dtype_name

logger = logging.getLogger("lora_ops")

LIBRARY = torch.library.Library("lora_ops", "DEF")


@dataclass(frozen=True)
class Backend:
    """A way to run ops: `module` is the file in an op's folder, `unavailable` says why it cannot run here, or None.

    One that is not `automatic` serves only where it is asked for by name.
    """

    name: str
    module: str
    device_types: tuple[str, ...]  # empty: every device
    unavailable: Callable[[], str | None]
    automatic: bool = True


@functools.cache
def _triton_unavailable() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


# In order of preference. Adding a backend is one line here and one file in each op's folder that it serves.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        # Until a GPU has verified and timed it.
        Backend("cuda", "cuda_impl", ("cuda",), cuda.unavailable_reason, automatic=False),
        Backend("triton", "triton_impl", ("cuda",), _triton_unavailable),
        Backend("native", "native_impl", ("cpu",), native.unavailable_reason),
        Backend("reference", "reference", (), lambda: None),
    )
}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class OpCall:
    """One call of an op, as a trace records it: what ran, where, in which dtype, and why no faster backend did."""

    op: str
    backend: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Trace:
    """The calls recorded by `trace()`, in order."""

    calls: list[OpCall] = field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """One row for each (op, backend, device, dtype, reason) with its `count`, most frequent first."""
        rows = Counter((c.op, c.backend, c.device, c.dtype, c.reason) for c in self.calls)
        keys = ("op", "backend", "device", "dtype", "reason")
        return [dict(zip(keys, row, strict=True), count=n) for row, n in rows.most_common()]

    def backends(self, op: str | None = None) -> set[str]:
        """Names of the backends that ran `op` (any op, if None)."""
        return {c.backend for c in self.calls if op is None or c.op == op}

    def __str__(self) -> str:
        lines = [f"{r['count']:>6} × {r['op']:<24} {r['backend']:<10} {r['device']} {r['dtype']}  {r['reason']}"
                 for r in self.summary()]  # fmt: skip
        return "\n".join(lines) or "no lora_ops op was called"


# Process-wide and not per thread: autograd runs the backward of a CUDA graph on threads of its own.
_lock = threading.Lock()
_traces: list[Trace] = []
_chosen: list[str] = []
_told: set[tuple[str, str, str]] = set()


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every op call of the process while the context is open.

    Returns:
        A context manager that yields a `Trace`; `trace.summary()` gives its rows, `print(trace)` a table.
    """
    record = Trace()
    with _lock:
        _traces.append(record)
    try:
        yield record
    finally:
        with _lock:
            # By identity: two traces opened around the same calls compare equal.
            _traces[:] = [t for t in _traces if t is not record]


def tracing() -> bool:
    """Whether a trace is open."""
    return bool(_traces)


def _check_backend_name(source: str, name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join([*BACKENDS, 'auto'])}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on the backend `name` while the context is open, in the whole process.

    An op that the backend cannot serve raises `BackendError` with the reason; "auto" restores the choice by device,
    dtype and shape. Without a context the environment variable LORA_OPS_BACKEND decides, "auto" by default.

    Args:
        name: "reference", "native", "triton", "cuda" or "auto".

    Raises:
        ValueError: if there is no backend of that name.
    """
    _check_backend_name("use_backend", name)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def current_backend() -> str:
    """The backend asked for: by the innermost `use_backend`, else by LORA_OPS_BACKEND, else "auto"."""
    return _chosen[-1] if _chosen else _backend_of_environment()


@functools.cache
def _backend_of_environment() -> str:
    """LORA_OPS_BACKEND, read once: a lookup that fails takes 1 µs, of 20 for a small layer."""
    return _check_backend_name("LORA_OPS_BACKEND", os.environ.get("LORA_OPS_BACKEND", "auto"))


def _dispatcher_state() -> tuple[int, int]:
    """What this thread asks of torch's dispatcher beyond a tensor's own keys: autocast, modes, transforms, tracing."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return included.raw_repr(), excluded.raw_repr()


def _plain_calls() -> tuple[frozenset[tuple[int, int]], frozenset[int]]:
    """States of the dispatcher and keys of a CPU tensor where nothing stands between an op and its kernel."""
    states, keys = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            states.add(_dispatcher_state())
            keys.add(torch._C._dispatch_keys(torch.empty(0)).raw_repr())
    return frozenset(states), frozenset(keys)


# In a thread of its own, whose state nothing has touched yet.
with ThreadPoolExecutor(1) as _thread:
    _PLAIN_STATES, _PLAIN_KEYS = _thread.submit(_plain_calls).result()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain_call(*operands: Tensor | None) -> bool:
    """Whether torch's dispatcher would do nothing but call the kernel, so that a public function may do so itself.

    That is, a call on CPU tensors that needs no gradient, outside of autocast, torch.compile, tracing, vmap, any other
    mode and the profiler. The way through the dispatcher costs 8 µs, and in a model whose weights do not fit the cache
    several times as much: a token's nf4_linear of 4096 x 4096 takes 150.
    """
    if torch.compiler.is_compiling() or _dispatcher_state() not in _PLAIN_STATES or _profiler_enabled():
        return False
    wants_grad, keys = torch.is_grad_enabled(), torch._C._dispatch_keys
    for t in operands:
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES or (wants_grad and t.requires_grad):
            return False
        if keys(t).raw_repr() not in _PLAIN_KEYS:
            return False
    return True


def as_output(t: Tensor, shape: Sequence[int]) -> Tensor:
    """`t`, fresh and contiguous, in the shape that an op returns: `t` itself, never a view.

    Of a custom function's output that is a view, autograd forbids the in-place changes that models make after their
    linear layers.
    """
    return t.resize_(shape)  # the same number of elements: nothing moves


OPS: dict[str, Op] = {}  # every op, by name


class Op:
    """An op registered with PyTorch's dispatcher, served by the backends whose files stand in its folder.

    Each backend file holds `IMPLS`, functions by op name, and may hold `declines(op, *args) -> str | None`, which
    answers why it cannot serve these arguments. The kernel registered under `schema` is `kernel(*schema_args)`, which
    bundles the operands and calls `run`.

    Args:
        schema: name and signature, for example "nf4_linear(Tensor x, ...) -> Tensor".
        package: the folder's package, `__package__` of the caller.
    """

    def __init__(self, schema: str, package: str) -> None:
        self.name = LIBRARY.define(schema)
        self.package = package
        self.qualname = f"lora_ops::{self.name}"
        self._modules: dict[str, ModuleType | None] = {}
        self._impls: dict[str, Callable] = {}
        self._candidates: dict[str, tuple[Backend, ...]] = {}
        OPS[self.name] = self

    def kernel(self, fn: Callable) -> Callable:
        """Register `fn` as the op's kernel on every device."""
        LIBRARY.impl(self.name, fn, "CompositeExplicitAutograd")
        return fn

    def fake(self, fn: Callable) -> Callable:
        """Register `fn` as the op's shape and dtype rule."""
        torch.library.register_fake(self.qualname, fn, lib=LIBRARY)
        return fn

    def autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """Register the op's gradient formula."""
        torch.library.register_autograd(self.qualname, backward, setup_context=setup_context, lib=LIBRARY)

    def not_differentiable(self) -> None:
        """Make a gradient through the op an error instead of a silent zero."""

        def backward(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(f"lora_ops.{self.name} has no gradient (double backward is not supported)")

        self.autograd(backward)

    def autocast(self, fn: Callable) -> Callable:
        """Register the op's autocast rule: `fn(dtype, *schema_args)` calls the op again on operands that it cast."""
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

            def rule(*args: Any, _device_type: str = device_type, _exclude: Any = exclude) -> Any:
                with torch._C._ExcludeDispatchKeyGuard(_exclude):
                    return fn(torch.get_autocast_dtype(_device_type), *args)

            LIBRARY.impl(self.name, rule, key)
        return fn

    def _module(self, backend: Backend) -> ModuleType | None:
        if backend.name not in self._modules:
            name = f"{self.package}.{backend.module}"
            module = importlib.import_module(name) if importlib.util.find_spec(name) else None
            if module is not None and self.name not in module.IMPLS:
                module = None
            if module is not None:
                self._impls[backend.name] = module.IMPLS[self.name]
            self._modules[backend.name] = module
        return self._modules[backend.name]

    def _declines(self, backend: Backend, args: Sequence[Any]) -> str | None:
        module = self._module(backend)
        if module is None:
            return f"{self.name} has no {backend.name} kernel"
        if reason := backend.unavailable():
            return reason
        declines = getattr(module, "declines", None)
        return declines(self.name, *args) if declines else None

    def _may_serve(self, backend: Backend, device_type: str) -> bool:
        here = not backend.device_types or device_type in backend.device_types
        return backend.automatic and here and self._module(backend) is not None

    def choose(self, device: torch.device, args: Sequence[Any]) -> tuple[str, str]:
        """The backend that serves these arguments, and the reason why no preferred one does ("" if none declined)."""
        asked = current_backend()
        if asked != "auto":
            if reason := self._declines(BACKENDS[asked], args):
                raise BackendError(
                    f"lora_ops.{self.name}: backend {asked!r} was asked for and cannot serve this call: {reason}"
                )
            return asked, "asked for"
        if device.type not in self._candidates:
            self._candidates[device.type] = tuple(b for b in BACKENDS.values() if self._may_serve(b, device.type))
        reasons: list[str] = []
        for backend in self._candidates[device.type]:
            reason = self._declines(backend, args)
            if reason is None:
                return backend.name, "; ".join(reasons)
            reasons.append(f"{backend.name}: {reason}")
            self._tell_once(backend.name, reason)
        raise BackendError(f"lora_ops.{self.name}: no backend serves {device.type}: {'; '.join(reasons)}")

    def _tell_once(self, backend: str, reason: str) -> None:
        key = (self.name, backend, reason)
        if key not in _told:
            _told.add(key)
            logger.warning("%s: the %s backend declined: %s", self.name, backend, reason)

    def run(self, lead: Tensor, *args: Any) -> Any:
        """Run the op on the chosen backend; `lead` is the operand whose device, dtype and shape stand in the trace."""
        backend, reason = self.choose(lead.device, args)
        if _traces:
            call = OpCall(self.name, backend, str(lead.device), dtype_name(lead.dtype), tuple(lead.shape), reason)
            with _lock:
                for record in _traces:
                    record.calls.append(call)
        return self._impls[backend](*args)
