"""What of a model is drawn anew, such as a classification head: it is trained whole, saved, and never quantized.

Found by looking: transformers marks each parameter that it loads; where nothing is marked, the modules beside the
backbone tell. Imports peft and transformers: imported only when `inject` or `quantize` is called.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Container, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from lora_ops.injection.dense import enclosing
from lora_ops.injection.reads import shorten

logger = logging.getLogger("lora_ops")

# Of which PEFT can make no module that is trained whole: they have no forward of their own.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def new_heads(model: nn.Module, apart: tuple[str, ...] = ()) -> list[str]:
    """The largest modules of which every parameter is drawn anew.

    Args:
        model: without adapters, or the base model of a PeftModel.
        apart: ends of module names, as in PEFT's modules_to_save, that are not taken into a larger module.

    Returns:
        Their names.
    """
    drawn = _drawn_anew(model)
    return list(_whole(model, "", drawn, apart)) if drawn else []


def inside(name: str, modules: Container[str]) -> bool:
    """Whether a module or parameter, by its name, is one of `modules` or lies in one."""
    return any(n in modules for n in enclosing(name))


def modules_to_save(model: nn.Module, given: list[str] | None) -> list[str] | None:
    """PEFT's modules_to_save: what the user names and what is drawn anew, none of it twice."""
    mine = tuple(given or ())
    drawn = _drawn_anew(model)
    found = list(_whole(model, "", drawn, mine))
    heads = [name for name in found if not (mine and name.endswith(mine))]
    rest = [name for name, p in model.named_parameters() if id(p) in drawn and not inside(name, found)]
    if loose := [name for name in rest if not (mine and any(n.endswith(mine) for n in enclosing(_holder(name))))]:
        logger.warning(
            "drawn anew, but not trained, since PEFT trains whole modules only: %s; put them into a module of their "
            "own and name it in modules_to_save",
            shorten(loose),
        )
    if given is None and not heads:
        return None
    return [*mine, *heads]


def keep_only(model: PeftModel, names: list[str] | None) -> None:
    """Put back what PEFT wrapped because its name ends like one of the heads', and drop names that it gave twice.

    PEFT looks for modules whose name ends in "head", which `lm_head` does as well, and adds "classifier" and "score"
    for some task types.

    Args:
        model: just made, with one adapter.
        names: the heads, by their full names, and what the user named.
    """
    (config,) = model.peft_config.values()
    if config.modules_to_save is None:
        return
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    root = model.get_base_model()
    every = {name for name, _ in root.named_modules()}
    exact = [name for name in names or () if name in every]
    endings = tuple(name for name in names or () if name not in every)
    for name, module in list(root.named_modules()):
        if not isinstance(module, ModulesToSaveWrapper) or inside(name, exact) or (endings and name.endswith(endings)):
            continue
        setattr(root.get_submodule(_holder(name)), name.rpartition(".")[2], module.original_module)


def tell_of_frozen_heads(model: PeftModel) -> None:
    """Say which heads of a given PeftModel are drawn anew and neither trained nor saved."""
    root = model.get_base_model()
    trained = [n for n, m in root.named_modules() if isinstance(m, (AuxiliaryTrainingWrapper, BaseTunerLayer))]
    frozen = [name for name in new_heads(root) if not inside(name, trained)]
    if frozen:
        logger.warning(
            "drawn anew, but neither trained nor saved by the adapter: %s; give the LoraConfig modules_to_save=%s",
            shorten(frozen),
            frozen[:4],
        )


def _whole(module: nn.Module, name: str, drawn: set[int], apart: tuple[str, ...]) -> Iterator[str]:
    parameters = list(module.parameters())
    if not any(id(p) in drawn for p in parameters):
        return
    named_within = apart and any(f"{name}.{n}".endswith(apart) for n, _ in module.named_modules() if n)
    if name and all(id(p) in drawn for p in parameters) and not isinstance(module, _CONTAINERS) and not named_within:
        yield name
        return
    for child_name, child in module.named_children():
        yield from _whole(child, f"{name}.{child_name}" if name else child_name, drawn, apart)


def _drawn_anew(model: nn.Module) -> set[int]:
    """The ids of the parameters that no checkpoint gave."""
    adapters = _adapter_parameters(model)
    floating = [p for p in model.parameters() if p.is_floating_point() and id(p) not in adapters]
    marked = {id(p) for p in floating if getattr(p, "_is_hf_initialized", False)}
    # Offload and sharding put other Parameters, which bear no mark, in the place of those that were loaded.
    drawn = {id(p) for p in floating if marked and id(p) not in marked and type(p) is nn.Parameter and not p.is_meta}
    return drawn | (_beside_the_backbone(model, bool(marked)) & {id(p) for p in floating})


def _adapter_parameters(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(p) for p in module.get_base_layer().parameters()}
            found |= {id(p) for p in module.parameters() if id(p) not in base}
    return found


def _beside_the_backbone(model: nn.Module, loaded: bool) -> set[int]:
    """The ids of the parameters that solve a task on top of a backbone, as the structure of the model tells.

    Of a model that predicts tokens, what stands beside the backbone was trained with it: the output embedding and
    what leads to it, projectors between towers. It has a new head only where it takes labels of a second kind.

    Args:
        model: any module.
        loaded: whether the parameters that a checkpoint gave are marked, so that only a task's head, which is trained
            on even where it was loaded, has to be found by structure.
    """
    backbones = [m for m in model.children() if isinstance(m, PreTrainedModel)]
    if not isinstance(model, PreTrainedModel):  # a wrapper, such as one with a value head
        backbones = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        return _beside(model, backbones)
    base: Any = model.base_model
    if base is not model:
        backbones.append(base)
    output = model.get_output_embeddings()
    labels = len(_labels(model))
    if output is not None or model.can_generate():
        if loaded or output is None or base is model or labels < 2:
            return set()
        backbones += [child for child in model.children() if any(m is output for m in child.modules())]
    elif not labels:  # a backbone, or projections that are trained with their towers
        return set()
    return _beside(model, backbones)


def _labels(model: nn.Module) -> list[str]:
    """The arguments of forward that the model is trained towards."""
    names = inspect.signature(type(model).forward).parameters
    return [n for n in names if "label" in n or "target" in n or n in ("start_positions", "end_positions")]


def _beside(model: nn.Module, backbones: list[Any]) -> set[int]:
    """The ids of the parameters that no backbone holds, if there is one."""
    inner = {id(p) for backbone in backbones for p in backbone.parameters()}
    return {id(p) for p in model.parameters()} - inner if inner else set()


def _holder(name: str) -> str:
    return name.rpartition(".")[0]
