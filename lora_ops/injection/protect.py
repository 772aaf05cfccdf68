"""Which linear layers stay out of NF4, and why. Imports peft: imported only when `inject` or `quantize` is called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ops.injection import heads
from lora_ops.nn import is_conv1d

if TYPE_CHECKING:
    from peft.tuners.lora import LoraConfig


def check_skip_modules(skip_modules: Any, quantize: str | None) -> list[str]:
    """The patterns of `skip_modules`, a name or several.

    Raises:
        TypeError: if it is neither a string nor strings.
        ValueError: if one is empty or no regular expression, or nothing is to be quantized.
    """
    if skip_modules is None:
        return []
    patterns = [skip_modules] if isinstance(skip_modules, str) else skip_modules
    if not isinstance(patterns, Iterable):
        raise TypeError(f"skip_modules: expected names or regular expressions, got {type(patterns).__name__}")
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip_modules: expected names or regular expressions, got a {type(pattern).__name__}")
        if not pattern:
            raise ValueError("skip_modules: expected names or regular expressions, got an empty one")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"skip_modules: {pattern!r} is neither a name nor a regular expression: {error}"
            ) from error
    if patterns and quantize is None:
        raise ValueError("skip_modules: expected together with quantize='nf4', got quantize=None, which quantizes none")
    return patterns


def skipped(root: nn.Module, patterns: list[str]) -> list[str]:
    """The names of the modules that `skip_modules` names, and of those that lie in them.

    A pattern matches a full name, the last components of one ("mlp.down_proj"), or a regular expression of either, and
    all that lies inside the module.

    Args:
        root: the model without PEFT's wrappers around it.
        patterns: as `check_skip_modules` gives them.

    Raises:
        ValueError: if a pattern matches no module; it names the nearest.
    """
    names = [name for name, _ in root.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        exact = re.escape(pattern) if re.fullmatch(r"[\w.\-]+", pattern) else pattern
        expression = re.compile(rf"(?:.*\.)?(?:{exact})(?:\..*)?")
        # Names of a PeftModel, as its report has them, begin with its two wrappers.
        matched = [n for n in names if expression.fullmatch(n) or expression.fullmatch(f"base_model.model.{n}")]
        if not matched:
            raise ValueError(
                f"skip_modules: {pattern!r} matches no module of {type(root).__name__}{_nearest(pattern, names)}"
            )
        found += matched
    return found


def _nearest(pattern: str, names: list[str]) -> str:
    length = pattern.count(".") + 1
    endings = {".".join(name.split(".")[-length:]) for name in names}
    near = difflib.get_close_matches(pattern, sorted(endings), n=1, cutoff=0.0)
    return f"; the nearest name is {near[0]!r}" if near else ""


def linear_layers(root: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """The linear layers of a model, an adapter's base under the adapter's name, but those that are trained whole.

    Yields:
        Name, the module that holds the layer as a child, and the layer.
    """
    within: set[str] = set()  # an adapter or a module that is trained whole, whose parts are not for themselves
    for name, module in root.named_modules():
        if not name or heads.inside(name, within):
            continue
        owner: Any = root.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            within = {name}
            if isinstance(module, AuxiliaryTrainingWrapper):
                continue
            owner, module = module, module.get_base_layer()
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield name, owner, module


def routers(root: nn.Module) -> list[str]:
    """The linear layers that choose among experts.

    Experts are found by looking: parameters of three dimensions, one matrix an expert, a list of alike modules, or a
    module without linear layers that has a number of experts. A linear layer beside them with one output an expert is
    their router, one with a single output gates a shared expert.
    """
    found: dict[str, None] = {}
    for name, block in root.named_modules():
        for experts, count in () if isinstance(block, BaseTunerLayer) else _experts(block):
            beside = [(n, m) for n, _, m in linear_layers(block) if not heads.inside(n, {experts})]
            chosen = [n for n, m in beside if _outputs(m) == count]
            # A router may also be a parameter that a module of the model's own multiplies with.
            if chosen or any(len(p) == count for n, p in block.named_parameters() if not heads.inside(n, {experts})):
                chosen += [n for n, m in beside if _outputs(m) == 1 and "." not in n]
            found |= dict.fromkeys(f"{name}.{n}" if name else n for n in chosen)
    return list(found)


def _experts(block: nn.Module) -> Iterator[tuple[str, int]]:
    """The children of a block that are experts, by name, and how many there are."""
    for name, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            kinds = {type(m) for m in child.children()}
            if len(kinds) == 1 and len(child) > 1 and any(True for _ in linear_layers(child)):
                yield name, len(child)
            continue
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(base, nn.modules.conv._ConvNd):
            continue
        counts = {len(p) for p in base.parameters(recurse=False) if p.dim() == 3}
        if not any(True for _ in linear_layers(base)):  # stacked in two dimensions: such a module says how many it has
            counts |= {n for m in base.modules() for key, n in vars(m).items() if "expert" in key and type(n) is int}
        yield from ((name, count) for count in counts if count > 1)


def _outputs(linear: Any) -> int:
    return linear.out_features if isinstance(linear, nn.Linear) else linear.nf


def kept_dense(root: nn.Module, patterns: list[str]) -> dict[str, str]:
    """Which modules quantize="nf4" leaves as they are with all that is in them, by name, and why.

    Args:
        root: a model, or the base model of a PeftModel.
        patterns: those of `skip_modules`.

    Raises:
        ValueError: if a pattern matches no module.
    """
    reasons = dict.fromkeys(skipped(root, patterns), "modules that skip_modules names")
    reasons |= dict.fromkeys(routers(root), "routers of experts")
    return reasons | dict.fromkeys(heads.new_heads(root), "modules that are drawn anew")


def check_quantizable(root: Any, kept: Container[str]) -> None:
    """Raise ValueError unless every linear layer but those in `kept` and the output embedding has its weight."""
    output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    names = [
        name
        for name, owner, linear in linear_layers(root)
        if linear.weight.is_meta and output not in (owner, linear) and not heads.inside(name, kept)
    ]
    if names:
        raise _no_values(root, names, "quantize='nf4' needs weights in memory")


def check_adaptable(model: nn.Module, config: LoraConfig) -> None:
    """Raise ValueError if a layer that gets an adapter is offloaded: PEFT leaves such an adapter without values too."""
    every = config.target_modules == "all-linear"
    names = [
        name
        for name, _, linear in linear_layers(model)
        if linear.weight.is_meta and hasattr(linear, "_hf_hook") and (every or check_target_module_exists(config, name))
    ]
    if names:
        raise _no_values(model, names, "an adapter needs the weights of its layer in memory")


def _no_values(root: nn.Module, names: list[str], need: str) -> ValueError:
    others = f" and {len(names) - 1} more weights" if names[1:] else ""
    if hasattr(root.get_submodule(names[0]), "_hf_hook"):
        state, step = "offloaded by accelerate", "load the model without offload, such as with device_map='cpu'"
    else:
        state, step = "on the meta device, without values", "load a checkpoint into the model first"
    return ValueError(f"model: {names[0]}.weight{others}: {state}; {need}: {step}")
