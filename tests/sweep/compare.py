"""One family, dense and in NF4: a forward and backward after `inject`, against stock PEFT over the same weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lora_ops
from lora_ops.nn import NF4Linear
from tests.sweep.families import Family
from tests.sweep.inputs import inputs_of
from tests.sweep.tiny import build

# Against stock PEFT in float32, relative to the largest value: both add the same products in another order, through
# two layers. The faults that the sweep looks for (a layer that is left out, a wrong scale) are over 1e-2.
TOLERANCE = 1e-3
AMPLIFIED = 16.0  # times stock PEFT's own distance from float64, where a model amplifies rounding (4.3 seen)
CHAOS = 1e-2  # stock PEFT's own distance from float64 beyond which float32 says nothing
RANK = 4


@dataclass
class Outcome:
    """What became of a family in one of the two formats.

    Attributes:
        verdict: "equal", "refused", "differs", "silent" (something is not served and nothing said so), "error", or
            "unbuilt" where transformers alone cannot build or run the tiny model.
        detail: the error, or what differs.
        said: what lora_ops told the user, and the report's reasons.
        fused: adapted layers on our ops, of how many.
    """

    verdict: str
    detail: str = ""
    said: list[str] = field(default_factory=list)
    fused: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Step:
    """A forward and backward: the output, and the gradients that are not zero, by name."""

    y: Tensor
    grads: dict[str, Tensor]

    def distance(self, other: Step) -> float:
        """The largest difference, relative to the other's largest output, or gradient of any parameter."""
        scale = max((float(g.abs().max()) for g in other.grads.values()), default=1.0)
        grads = (float((self.grads[n] - g).abs().max()) / scale for n, g in other.grads.items() if n in self.grads)
        y = float((self.y - other.y).abs().max() / other.y.abs().max().clamp_min(1e-12)) if other.y.numel() else 0.0
        return max(y, *grads, 0.0)


def run(family: Family) -> dict[str, Outcome]:
    """Outcomes by format, "dense" and "nf4"."""
    torch.manual_seed(0)
    try:
        model = build(family)
        batch = inputs_of(model)
        _step(copy.deepcopy(model), batch)
    except Exception as error:
        return {f: Outcome("unbuilt", _line(error)) for f in ("dense", "nf4")}
    return {
        name: _compare(copy.deepcopy(model), batch, quantize) for name, quantize in (("dense", None), ("nf4", "nf4"))
    }


def output_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The first floating tensor with a batch that the model returns: logits, where it has any."""
    torch.manual_seed(0)  # some models sample inside
    out = model(**batch)
    values = [getattr(out, "logits", None), *(out.values() if hasattr(out, "values") else out)]
    return next(t for t in values if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0)


def _compare(model: PreTrainedModel, batch: dict[str, Any], quantize: str | None) -> Outcome:
    base = copy.deepcopy(model)
    with _heard() as said:
        # The same adapters each time. With 0 one of fsmt's sums stands on the edge of a ReLU, and it has no float64.
        torch.manual_seed(1)
        try:
            ours = lora_ops.inject(model, r=RANK, quantize=quantize, init_lora_weights=False).eval()
        except (ValueError, TypeError, NotImplementedError, lora_ops.injection.InjectionError) as error:
            changed = {n: type(m) for n, m in model.named_modules()} != {n: type(m) for n, m in base.named_modules()}
            return Outcome("error" if changed else "refused", _line(error), said)
        except Exception as error:
            return Outcome("error", f"inject: {_line(error)}", said)
        called = _watch(ours)
        try:
            got = _step(ours, batch)
        except Exception as error:
            return Outcome("error", f"step: {_line(error)}", said)
    report = lora_ops.injection_report(ours)
    with_adapter = {name for name, module in ours.named_modules() if hasattr(module, "lora_A")}
    adapted = [row for row in report if row.name in with_adapter]
    outcome = Outcome("equal", "", said, (sum(row.fused for row in adapted), len(adapted)))
    try:
        stock = _stock(base, ours)
        want = _step(stock, batch)
    except Exception as error:
        outcome.verdict, outcome.detail = "error", f"stock PEFT: {_line(error)}"
        return outcome
    exact = lambda: tuple(_step(copy.deepcopy(m).double(), _doubled(batch)) for m in (ours, stock))  # noqa: E731
    if difference := _difference(got, want, exact):
        outcome.verdict, outcome.detail = "differs", difference
    elif unsaid := _unsaid(ours, quantize, called, said):
        outcome.verdict, outcome.detail = "silent", unsaid
    said += sorted({row.reason for row in report if row.reason})
    return outcome


def _watch(model: nn.Module) -> set[str]:
    """A set that fills with the names of the adapted layers whose forward runs."""
    called: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    return called


def _doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def _difference(got: Step, want: Step, exact: Callable[[], tuple[Step, ...]]) -> str:
    """What of `got` is further from stock PEFT's `want` than rounding explains, or "".

    Where float32 leaves a doubt, both are compared as `exact`, in float64: some models amplify rounding until nothing
    of a gradient is left in float32, in stock PEFT too.
    """
    if got.y.shape != want.y.shape:
        return f"output of shape {tuple(got.y.shape)}, expected {tuple(want.y.shape)}"
    if lost := [n for n in want.grads if n not in got.grads]:
        return f"no gradient: {lost[0]} and {len(lost) - 1} more"
    if (distance := got.distance(want)) <= TOLERANCE:
        return ""
    try:
        ours, theirs = exact()
    except Exception as error:
        return f"{distance:.1e} from stock PEFT, and the model has no float64: {_line(error)}"
    rounding, remains = want.distance(theirs), ours.distance(theirs)
    if remains <= TOLERANCE and (rounding > CHAOS or got.distance(theirs) <= AMPLIFIED * rounding):
        return ""
    return f"{distance:.1e} from stock PEFT, {remains:.1e} in float64"


def _unsaid(ours: Any, quantize: str | None, called: set[str], said: list[str]) -> str:
    """What is not served although nothing says so, or ""."""
    rows = {row.name: row for row in lora_ops.injection_report(ours)}
    adapted = [name for name, module in ours.named_modules() if hasattr(module, "lora_A")]
    for name in adapted:
        if name not in called and not rows[name].reason and name in rows:
            return f"never called, and the report says nothing: {name}"
    if quantize and (dense := _dense_weights(ours)) and not any("dense" in line for line in said):
        return f"left dense: {', '.join(dense)[:120]}"
    return ""


def _step(model: nn.Module, batch: dict[str, Any]) -> Step:
    model.zero_grad(set_to_none=True)
    y = output_of(model, batch)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    finite = torch.where(torch.isfinite(y), y, torch.zeros((), dtype=y.dtype))
    (finite * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return Step(finite.detach(), {n: g for n, g in grads.items() if bool((g != 0).any())})


def _stock(base: PreTrainedModel, ours: Any) -> nn.Module:
    """PEFT's own model with the same adapters, over the weights that ours stands for: dequantized if they are NF4."""
    config = copy.deepcopy(ours.peft_config["default"])
    for name, module in ours.get_base_model().named_modules():
        if isinstance(module, NF4Linear):
            linear = base.get_submodule(name.removesuffix(".base_layer").removesuffix(".original_module"))
            dense = module.dequantize(torch.float32)
            linear.weight.data = dense.T.contiguous() if type(linear).__name__ == "Conv1D" else dense
    stock = peft.get_peft_model(base, config).eval()
    theirs, mine = dict(stock.named_parameters()), dict(ours.named_parameters())
    for name, p in theirs.items():
        if p.requires_grad and name in mine:
            p.data = mine[name].data.clone()
        p.requires_grad_(p.requires_grad and name in mine)  # PEFT wraps whatever ends in a name of modules_to_save
    return stock


def _dense_weights(model: Any) -> list[str]:
    """Frozen matrices that NF4 could hold: not embeddings, the output embedding, norms or what is trained."""
    root = model.get_base_model()
    output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    embeddings = {id(p) for m in root.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    if output is not None:
        embeddings |= {id(p) for p in output.parameters()}
    kinds: Counter[str] = Counter()
    for name, module in root.named_modules():
        convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
        for key, p in module.named_parameters(recurse=False):
            frozen = not p.requires_grad and p.is_floating_point() and p.dim() >= 2
            if frozen and not convolution and id(p) not in embeddings and p.numel() >= 1024:
                kinds[f"{name.rpartition('.')[2]}.{key}"] += 1
    return sorted(kinds)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the logger "lora_ops" and warnings say meanwhile."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("lora_ops")
    logger.addHandler(listener)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    logger.removeHandler(listener)
    said += [str(w.message) for w in caught if "lora_ops" in w.filename]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
