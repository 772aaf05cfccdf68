"""Which layers' weights a model's own code reads: found in the source of its forwards.

A layer whose weight is read, as in `F.linear(x, self.fc.weight)`, is not called there: an adapter has no part in that,
and a weight in NF4 would be taken for an array of bytes. Each function is read once, however many modules run it; what
it reads is then looked up in every one of them. Nothing of the model runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ops.injection.source import ALL, EACH, Guard, Use, Value, function_of, method_of, outcome, summarize
from lora_ops.nn import LoRALinear, NF4Linear

logger = logging.getLogger("lora_ops")


@dataclass(frozen=True)
class WeightRead:
    """That a model's code reads the weight of a layer.

    Attributes:
        use: Use.VALUE, or Use.FORM where dtype or shape alone are read, so that the layer is called and may be adapted.
        reader: the function that reads it, "WavLMAttention.forward".
        even_quantized: whether it does so in a model, too, that says that it is quantized.
    """

    use: Use
    reader: str
    even_quantized: bool

    @property
    def called(self) -> bool:
        """Whether the layer is called for all that, so that an adapter has its effect."""
        return self.use is Use.FORM

    @property
    def reason(self) -> str:
        return f"{self.reader} reads {'' if self.use is Use.VALUE else 'the dtype or shape of '}its weight"


def weight_reads(model: nn.Module) -> dict[nn.Module, WeightRead]:
    """The modules whose weight the model's code reads, each with the read that asks most of it."""
    walk = _Walk()
    for module in _own_modules(model):
        walk.method(module, "forward", {})
        walk.method(module, "__call__", {})
    return walk.found


def leave_out(model: nn.Module, names: set[str]) -> set[str]:
    """Those of these layers whose weight the model's code reads instead of calling them; says so, if there are any.

    Raises:
        ValueError: if none of the layers is left.
    """
    found = weight_reads(model)
    read = {name: found[m] for name, m in model.named_modules() if name in names and m in found and not found[m].called}
    if not read:
        return set()
    if names <= read.keys() | {""}:
        name, first = next(iter(read.items()))
        raise ValueError(
            f"target_modules: 'all-linear' finds no layer in {type(model).__name__} that is always called: of {name} "
            f"{first.reason}, as of the others; name the modules to adapt all the same, or another model"
        )
    logger.warning("no adapter for layers whose weight the model's own code reads: %s", _described(read))
    return set(read)


def tell_adapted(model: Any) -> None:
    """Say which layers of a PeftModel have adapters that the model's code passes by."""
    root = model.get_base_model()
    found = weight_reads(root)
    read = {
        name: found[m]
        for name, m in root.named_modules()
        if hasattr(m, "get_base_layer") and m in found and not found[m].called
    }
    if read:
        logger.warning(
            "adapters without effect where the model's own code reads the layer's weight instead of calling it: %s; "
            "leave them out of target_modules",
            _described(read),
        )


def _described(read: Mapping[str, WeightRead]) -> str:
    by_reader: dict[str, list[str]] = {}
    for name, r in read.items():
        by_reader.setdefault(r.reader, []).append(name)
    return "; ".join(f"{shorten(names)} (read by {reader})" for reader, names in by_reader.items())


def shorten(names: Iterable[str], most: int = 4) -> str:
    """Names of modules or parameters in a line: those that differ in a number as one, and the first few."""
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", n.replace(".base_layer", "")) for n in names))
    return ", ".join(patterns[:most]) + (f" and {len(patterns) - most} more" if len(patterns) > most else "")


def _own_modules(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """The modules with children whose code is the model's: not what lies inside of an adapted layer."""
    seen = set() if seen is None else seen
    if module in seen or not module._modules or _is_adapted(module):
        return
    seen.add(module)
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _own_modules(child, seen)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (LoRALinear, NF4Linear)) or hasattr(module, "get_base_layer")


class _Walk:
    def __init__(self) -> None:
        self.found: dict[nn.Module, WeightRead] = {}
        self.seen: set[Any] = set()

    def method(self, module: nn.Module, name: str, args: Mapping[int | str, list[Any]], even: bool = True) -> None:
        """Look up in `module` what its method reads, given these modules as arguments."""
        key = (id(module), name, even, tuple((k, tuple(map(id, v))) for k, v in args.items()))
        if key in self.seen or _is_adapted(module):
            return
        self.seen.add(key)
        cls = type(module)
        method = method_of(cls, name)
        if method is not None:
            self.apply(module, summarize(method[0], cls, method[1]), args, even)
        # A forward of the instance's own, such as another library's patch.
        if (patch := function_of(module.__dict__.get(name))) is not None:
            self.apply(module, summarize(patch, cls), args, even)

    def apply(self, module: nn.Module, summary: Any, args: Mapping[int | str, list[Any]], even: bool) -> None:
        given: dict[str, list[Any]] = {}
        for i, name in enumerate(summary.parameters):
            given[name] = [module] if i == 0 else [*args.get(i, ()), *args.get(name, ())]
        for read in summary.reads:
            if any(_is_excluded(guard, given) for guard in read.guards):
                continue
            for target in _resolve(read.weight, given):
                if target is not module:  # a layer's own code may do with its weight what it likes
                    self.note(target, WeightRead(read.use, read.reader, read.even_quantized and even))
        for call in summary.calls:
            inner = {k: [m for v in vs for m in _resolve(v, given)] for k, vs in call.args}
            inner = {k: v for k, v in inner.items() if v}
            for target in _resolve(call.module, given):
                if isinstance(target, nn.Module) and (inner or call.method not in ("__call__", "forward")):
                    child = target._modules.get(call.method)  # `self.child(x)`, which is no method
                    names = {call.method, "forward"} if call.method == "__call__" else {call.method}
                    for name in names if child is None else {"__call__", "forward"}:
                        self.method(target if child is None else child, name, inner, call.even_quantized and even)

    def note(self, target: Any, read: WeightRead) -> None:
        known = self.found.get(target)
        if isinstance(target, nn.Module) and (known is None or _rank(read) > _rank(known)):
            self.found[target] = read


def _rank(read: WeightRead) -> tuple[bool, int]:
    return read.even_quantized, int(read.use)


def _resolve(value: Value, given: Mapping[str, list[Any]]) -> list[Any]:
    """The objects that a value stands for."""
    found = given.get(value.root, [])
    for part in value.path:
        found = [child for owner in found for child in _step(owner, part)]
    if value.kind == "first":
        found = [holder for owner in found if isinstance(owner, nn.Module) for holder in _first_holder(owner)]
    return found


def _is_excluded(guard: Guard, given: Mapping[str, list[Any]]) -> bool:
    """Whether constants of the module say that the code behind this test never runs, such as `self.config.tp > 1`."""
    found = _resolve(Value("module", guard.root, guard.path), given)
    return len(found) == 1 and outcome(guard.test, guard.name, found[0]) is (not guard.holds)


def _step(owner: Any, part: str) -> Iterator[Any]:
    if isinstance(owner, nn.Module):
        if part == ALL:
            yield from owner.modules()
        elif part == EACH:
            yield from (child for child in owner._modules.values() if child is not None)
        else:
            child = owner._modules.get(part, owner.__dict__.get(part))
            if isinstance(child, (nn.Module, list, tuple, dict)):
                yield child
    elif isinstance(owner, dict):
        yield from (v for k, v in owner.items() if part in (EACH, str(k)))
    elif isinstance(owner, (list, tuple)):
        yield from (v for i, v in enumerate(owner) if part in (EACH, str(i)))


def _first_holder(module: nn.Module) -> list[nn.Module]:
    """The module that holds the first of another's parameters."""
    return [m for m in module.modules() if any(p is not None for p in m._parameters.values())][:1]
