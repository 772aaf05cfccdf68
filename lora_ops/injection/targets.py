"""Which layers get adapters, and which of PEFT's task types a model has. Imports peft and transformers: only `inject`
imports this file, when called."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Container

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from lora_ops.injection import heads, linears
from lora_ops.injection.reads import shorten
from lora_ops.nn import is_conv1d

logger = logging.getLogger("lora_ops")

# Not QUESTION_ANS: the forward of PEFT's class for it (0.21) takes token_type_ids and position_ids and drops them.
_CLASSIFIERS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
_OPTIONAL = {"output_attentions", "output_hidden_states", "return_dict"}  # of PEFT's forwards: **kwargs may take them
_OWN = {"self", "kwargs", "task_ids"}  # of PEFT's forwards: these it does not pass


def all_linear(model: nn.Module, trained_whole: list[str], left_out: Container[str] = ()) -> list[str] | str:
    """PEFT's target_modules for every linear layer but the output embedding and what is trained whole.

    Args:
        model: without adapters.
        trained_whole: ends of module names, as in PEFT's modules_to_save.
        left_out: names of further layers that get no adapter; "all-linear" does not say which.

    Returns:
        "all-linear" for a model of transformers without a linear head, for others their full names. Where PEFT, which
        looks for modules whose name ends in one of those, would take others as well: a regular expression that matches
        exactly them.

    Raises:
        ValueError: if there is none.
    """
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = {name: m for name, m in model.named_modules() if name}
    whole = {name for name in modules if trained_whole and name.endswith(tuple(trained_whole))}
    found = [name for name, m in modules.items() if (isinstance(m, nn.Linear) or is_conv1d(m)) and m is not output]
    names = sorted(name for name in found if name not in left_out and not heads.inside(name, whole))
    if not names:
        raise ValueError(
            f"target_modules: 'all-linear' finds no linear layer in {type(model).__name__} that is not trained whole; "
            "name the modules to adapt"
        )
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) and name not in left_out for name in modules.keys() - set(names)):
        return "|".join(map(re.escape, names))
    # PEFT's own list would hold linear heads too; one that is named "lm_head" it takes for an embedding when it saves.
    shorthand = isinstance(model, PreTrainedModel) and not any(heads.inside(name, whole) for name in found)
    return "all-linear" if shorthand else names


def leave_out(model: nn.Module, names: set[str]) -> set[str]:
    """Those of these layers that return something else than a tensor of features, such as routers; says which."""
    odd = {name: m for name, m in model.named_modules() if name in names and not linears.returns_features(m)}
    if odd:
        classes = ", ".join(sorted({type(m).__name__ for m in odd.values()}))
        logger.warning("no adapter for layers that return no tensor of their features (%s): %s", classes, shorten(odd))
    return set(odd)


def task_type(model: nn.Module, trained_whole: list[str]) -> str | None:
    """PEFT's task type, which gives the PeftModel its `generate` and tells AutoPeftModel which class to load.

    None where PEFT's class for it would not suit the model: its forward passes input_ids and others by name, and a
    classifier's wraps what is named "classifier" or "score", which may hold a part that is wrapped for itself.

    Args:
        model: without adapters.
        trained_whole: ends of module names, as in PEFT's modules_to_save.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return None
    if model.can_generate():
        task: str | None = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    else:
        names = {cls.__name__ for cls in type(model).__mro__}
        task = next((task for task, known in _CLASSIFIERS.items() if names.intersection(known.values())), None)
        wrapped = {name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))}
        parts = [name for name, _ in model.named_modules() if heads.inside(name, wrapped) and name not in wrapped]
        if any(name.endswith(ending) for name in parts for ending in trained_whole):
            return None
    if task is None:
        return None
    passed = inspect.signature(MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].forward).parameters.keys() - _OWN
    taken = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        passed -= _OPTIONAL
    return task if passed <= taken.keys() else None
