"""What of a model can stand in NF4, and what stays dense and why: with names, bytes and shares."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from lora_ops.injection.linears import why_not_linear
from lora_ops.injection.reads import shorten, weight_reads
from lora_ops.nn import LoRALinear, NF4Linear, is_conv1d

logger = logging.getLogger("lora_ops")


class Reason(NamedTuple):
    """Why a parameter stays dense.

    Attributes:
        text: in words for a user.
        by_design: whether `quantize="nf4"` does not mean to take it, so that `strict` lets it pass.
    """

    text: str
    by_design: bool


NOT_QUANTIZED = Reason("linear layers that are not quantized", True)


@dataclass(frozen=True)
class DenseWeights:
    """Parameters of a model that are dense for one reason.

    Attributes:
        reason: why.
        by_design: whether `quantize="nf4"` does not mean to take them, so that `strict` lets them pass.
        names: of the parameters, in the model.
        nbytes: of them all.
    """

    reason: str
    by_design: bool
    names: tuple[str, ...]
    nbytes: int

    def describe(self, total: int) -> str:
        """A line: bytes, share of `total`, reason and names."""
        return f"{mib(self.nbytes)} ({share(self.nbytes, total)}) {self.reason}: {shorten(self.names)}"


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.{1 if nbytes >= 2**20 else 3}f} MiB"


def share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "0%"


def dense_reasons(root: nn.Module, kept: Mapping[str, str] = MappingProxyType({})) -> dict[nn.Parameter, Reason]:
    """Why each frozen parameter of a model stays dense; those that NF4 can take are not among them.

    Args:
        root: the model, with adapters or without; not the PeftModel around it.
        kept: names of modules to leave dense with all that is in them, and why.
    """
    return _Reasons(root, kept).reasons


class _Reasons:
    """Walks through a model; a parameter with several holders stays dense if one of them needs it so."""

    def __init__(self, root: Any, modules: Mapping[str, str]) -> None:
        self.root, self.reads = root, weight_reads(root)
        self.output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
        kept = {*(getattr(root, "_keep_in_fp32_modules", None) or ()),
                *(getattr(root, "_keep_in_fp32_modules_strict", None) or ())}  # fmt: skip
        self.kept = re.compile("|".join(rf"(^|\.)(?:{name})($|\.)" for name in sorted(kept)) or "(?!)")
        self.modules = modules
        self.reasons: dict[nn.Parameter, Reason] = {}
        adapters = adapter_parameters(root)
        self.layers = {m.get_base_layer(): m for m in root.modules() if hasattr(m, "get_base_layer")}
        whole = ""  # a module that is trained whole
        module: nn.Module
        for name, module in root.named_modules():
            if not (whole and name.startswith(whole)):
                whole = name + "." if is_trained_whole(module) else ""
            for key, p in module._parameters.items():
                if p is None or p in adapters or (isinstance(module, NF4Linear) and key != "bias"):
                    continue
                if whole or p.requires_grad:
                    reason: Reason | None = Reason("modules that are trained whole", True)
                else:
                    reason = self.why(name.removesuffix(".base_layer"), module, key, p)
                if reason is not None and (p not in self.reasons or self.reasons[p].by_design):
                    self.reasons[p] = reason

    def why(self, name: str, module: nn.Module, key: str, p: nn.Parameter) -> Reason | None:
        """Why one module needs its parameter dense, by what it is and who reads it."""
        if isinstance(module, parametrize.ParametrizationList):  # of the module that stands above it
            module = self.root.get_submodule(name.rpartition(".parametrizations")[0])
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        layer = self.layers.get(module, module)
        if (above := next((n for n in enclosing(name) if n in self.modules), None)) is not None:
            return Reason(self.modules[above], True)
        if not p.dtype.is_floating_point or type(p) is not nn.Parameter:
            return Reason(f"weights in another library's format ({type(module).__name__})", True)
        if self.output is not None and self.output in (module, layer):
            return Reason("output embedding", True)
        if self.kept.search(f"{name}.{key}"):
            return Reason("modules that the model keeps in float32", True)
        if p.dim() <= 1:
            return Reason("biases, norms and other vectors", True)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return Reason("embeddings", True)
        if isinstance(module, nn.modules.conv._ConvNd):
            return Reason("convolutions", True)
        if not linear and p.dim() >= 3 and p.shape[0] > 1:
            return Reason(f"stacks of matrices, as of experts, of {type(module).__name__}", False)
        if not linear or not name:
            return Reason(f"parameters of {type(module).__name__}", True)
        read = self.reads.get(layer) or self.reads.get(module)
        if read is not None and read.even_quantized:
            return Reason(f"layers whose weight the model's own code reads ({read.reason})", False)
        why = why_not_linear(module) if key == "weight" else "its weight is computed from others"
        if why is None and layer is not module and not isinstance(layer, LoRALinear):
            from lora_ops.injection import peft_layers

            why = peft_layers.why_not_fusable(layer)
        return None if why is None else Reason(f"layers that NF4Linear cannot replace ({why})", False)


def enclosing(name: str) -> Iterator[str]:
    """The name of a module or parameter and those of all that it lies in, from the inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def is_trained_whole(module: nn.Module) -> bool:
    """Whether this is PEFT's wrapper of a module that it trains beside the adapters; told by its name."""
    return any(cls.__name__ == "AuxiliaryTrainingWrapper" for cls in type(module).__mro__)


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all adapters of a model, active or not."""
    found: set[nn.Parameter] = set()
    module: Any
    for module in model.modules():
        names = ("lora_A", "lora_B") if isinstance(module, LoRALinear) else getattr(module, "adapter_layer_names", ())
        for name in names:
            part = getattr(module, name, None)
            if isinstance(part, nn.Parameter):
                found.add(part)
            elif isinstance(part, (nn.Module, nn.ParameterDict)):
                found.update(part.parameters())
    return found


@dataclass(frozen=True)
class ModelBytes:
    """What a model's parameters and buffers take, each counted once.

    Attributes:
        nf4: bytes of weights in NF4, with their scales.
        nf4_before: bytes of the same weights in the dtype that they were quantized from.
        adapters: bytes of all adapters.
        dense: the rest, by reason; what is not by design comes first, then by size.
    """

    nf4: int
    nf4_before: int
    adapters: int
    dense: tuple[DenseWeights, ...]

    @property
    def dense_bytes(self) -> int:
        return sum(row.nbytes for row in self.dense)

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.nf4 + self.adapters + self.dense_bytes

    def __str__(self) -> str:
        line = f"{mib(self.total)}: {mib(self.dense_bytes)} dense, {mib(self.adapters)} adapters"
        if not self.nf4:
            return line
        line += f", {mib(self.nf4)} in NF4 ({mib(self.nf4_before)} before); dense are"
        return "\n  ".join([line, *(row.describe(self.total) for row in self.dense)])


def model_bytes(model: Any, reasons: Mapping[nn.Parameter, Reason] | None = None) -> ModelBytes:
    """Count what a model's parameters and buffers take, by format and, for the dense ones, by the reason.

    Args:
        model: any module, or a PeftModel.
        reasons: of `dense_reasons`, if known.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    reasons = dense_reasons(root) if reasons is None else reasons
    adapters = adapter_parameters(model)
    linears = [m for m in model.modules() if isinstance(m, NF4Linear)]
    nf4 = {
        t
        for m in linears
        for key, t in [*m._parameters.items(), *m._buffers.items()]
        if t is not None and key != "bias"
    }
    weights = {m.weight: m for m in linears}
    before = sum(m.in_features * m.out_features * m.quantized_dtype.itemsize for m in weights.values())
    groups: dict[Reason, dict[str, int]] = {}
    for name, p in model.named_parameters():
        if p not in nf4 and p not in adapters:
            groups.setdefault(reasons.get(p, NOT_QUANTIZED), {})[name] = p.nbytes
    for name, buffer in model.named_buffers():
        if buffer not in nf4:
            groups.setdefault(Reason("buffers", True), {})[name] = buffer.nbytes
    rows = [DenseWeights(*reason, tuple(names), sum(names.values())) for reason, names in groups.items()]
    rows.sort(key=lambda row: (row.by_design, -row.nbytes))
    return ModelBytes(sum(p.nbytes for p in nf4), before, sum(p.nbytes for p in adapters), tuple(rows))


def tell(root: nn.Module, reasons: Mapping[nn.Parameter, Reason]) -> None:
    """Say what `quantize="nf4"` left dense."""
    counted = model_bytes(root, reasons)
    if counted.dense_bytes:
        logger.warning("quantize='nf4': the model takes %s", counted)
