"""Ops: PyTorch's dispatcher is their registry, and each has one kernel there, which calls `Op.run`.

The choice between backends is made inside it, at run time, so that it neither breaks nor re-traces a compiled graph.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_ops.runtime.backends import BACKENDS, Backend, BackendError, current_backend
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.trace import OpCall, open_traces, record

logger = logging.getLogger("lora_ops")

LIBRARY = torch.library.Library("lora_ops", "DEF")
_told: set[tuple[str, str, str]] = set()


def as_output(t: Tensor, shape: Sequence[int]) -> Tensor:
    """`t`, fresh and contiguous, in the shape that an op returns: `t` itself, never a view.

    Of a custom function's output that is a view, autograd forbids the in-place changes that models make after their
    linear layers.
    """
    return t.resize_(shape)  # the same number of elements: nothing moves


Declines = Callable[..., "str | None"]
OPS: dict[str, Op] = {}  # every op, by name


def _declines_of(module: ModuleType | None) -> Declines:
    return getattr(module, "declines", lambda op, lead, **operands: None)


class Op:
    """An op registered with PyTorch's dispatcher, served by the backends whose files stand in its folder.

    Each backend file holds `IMPLS`, functions by op name, which take the operands by keyword, and may hold
    `declines(op, lead, **operands) -> str | None`, which answers why it cannot serve them. The kernel registered under
    `schema` is `kernel(*schema_args)`, which bundles the operands and calls `run`.

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
        self._candidates: dict[str, list[tuple[Backend, Declines]]] = {}
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

    def _declines(self, backend: Backend, lead: Tensor, operands: dict[str, Any]) -> str | None:
        module = self._module(backend)
        if module is None:
            return f"{self.name} has no {backend.name} kernel"
        if reason := backend.unavailable():
            return reason
        return _declines_of(module)(self.name, lead, **operands)

    def _may_serve(self, backend: Backend, device_type: str) -> bool:
        here = not backend.device_types or device_type in backend.device_types
        return backend.automatic and here and self._module(backend) is not None

    def choose(self, lead: Tensor, operands: dict[str, Any]) -> tuple[str, str]:
        """The backend that serves these operands, and the reason why no preferred one does ("" if none declined)."""
        asked = current_backend()
        if asked != "auto":
            if reason := self._declines(BACKENDS[asked], lead, operands):
                raise BackendError(
                    f"lora_ops.{self.name}: backend {asked!r} was asked for and cannot serve this call: {reason}"
                )
            return asked, "asked for"
        device_type = lead.device.type
        if device_type not in self._candidates:
            self._candidates[device_type] = [
                (b, _declines_of(self._modules[b.name])) for b in BACKENDS.values() if self._may_serve(b, device_type)
            ]
        reasons: list[str] = []
        for backend, declines in self._candidates[device_type]:
            reason = backend.unavailable() or declines(self.name, lead, **operands)
            if reason is None:
                return backend.name, "; ".join(reasons)
            reasons.append(f"{backend.name}: {reason}")
            self._tell_once(backend.name, reason)
        raise BackendError(f"lora_ops.{self.name}: no backend serves {device_type}: {'; '.join(reasons)}")

    def _tell_once(self, backend: str, reason: str) -> None:
        key = (self.name, backend, reason)
        if key not in _told:
            _told.add(key)
            logger.warning("%s: the %s backend declined: %s", self.name, backend, reason)

    def run(self, lead: Tensor, **operands: Any) -> Any:
        """Run the op on the chosen backend.

        Args:
            lead: the operand by whose device and dtype the backend is chosen, and which stands in the trace.
            operands: of the op, `lead` among them.
        """
        backend, reason = self.choose(lead, operands)
        if open_traces:
            record(OpCall(self.name, backend, str(lead.device), dtype_name(lead.dtype), tuple(lead.shape), reason))
        return self._impls[backend](**operands)
