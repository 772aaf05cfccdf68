"""Which of PEFT's methods may stand on NF4 layers, and how the others are told so; see docs/peft_methods.md.

PEFT takes an NF4Linear for the nn.Linear that it is, whichever method wraps it, and some methods then read its packed
codes as numbers: they fail in words that name nothing, or learn nothing. PEFT asks no one before it wraps a layer, but
torch does: its hook on the registration of submodules sees a layer at the moment when another takes it in.

Imports torch only.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lora_ops.injection.counts import count_as_dense
from lora_ops.nn import NF4Linear

# By their packages in peft.tuners. Each trains over NF4 as over the same weights held dense: a test compares.
TESTED = ("beft", "boft", "fourierft", "ia3", "lily", "lora", "miss", "oft", "pvera", "randlora", "road", "vblora",
          "vera", "waveft")  # fmt: skip

_hook: Any = None


def watch() -> None:
    """See from now on what takes in an NF4 layer; a second call changes nothing."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    package = type(parent).__module__.split(".")
    if package[0] != "peft" or child is None:  # None: as PEFT's trainable tokens register a module that is not there
        return
    nf4 = next(((n, m) for n, m in child.named_modules() if isinstance(m, NF4Linear)), None)
    if nf4 is None:
        return
    if name == "base_model":
        count_as_dense(parent)
    elif name == "original_module":  # of PEFT's wrapper of a module that is to be trained whole
        raise untrainable(nf4[0] or type(child).__name__, nf4[1])
    elif name == "model" and package[1] == "tuners" and package[2] not in TESTED:
        parent.__dict__["_create_and_replace"] = MethodType(_checked_replace, parent)
    elif name == "base_layer" and child is nf4[1]:
        if package[2:] == ["lora", "layer"] and type(parent).__name__ == "Linear":
            from lora_ops.injection import peft_layers

            parent.__class__ = peft_layers.LoraNF4Linear  # before it reads its adapter's configuration
        else:
            refuse_merge(parent)


def _checked_replace(self: Any, config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A PEFT tuner's `_create_and_replace`, which asks first."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    method = type(config).__module__.split(".")[2]  # not that of a tuner which mixes several
    if isinstance(base, NF4Linear) and method not in TESTED:
        raise TypeError(
            f"{method}: expected a PEFT method that can stand on NF4 weights ({', '.join(TESTED)}), got a "
            f"{type(config).__name__} for {_shape(base)}; use one of those, or keep the target dense with skip_modules "
            "when the model is quantized"
        )
    return type(self)._create_and_replace(self, config, adapter_name, target, *args, **kwargs)


def untrainable(name: str, layer: NF4Linear) -> TypeError:
    """The error for a module that is to be trained whole and is, or has in it, an NF4 layer."""
    return TypeError(
        f"modules_to_save: expected modules that can be trained whole, got {name}, {_shape(layer)}, whose weight is in "
        "NF4; keep it dense with skip_modules when the model is quantized, or name it in modules_to_save of inject"
    )


def refuse_merge(layer: nn.Module) -> None:
    """Let `merge` of PEFT's layer say what it could not do, instead of adding numbers to codes."""
    layer.__dict__["merge"] = MethodType(_refused_merge, layer)


def allow_merge(layer: nn.Module) -> None:
    """Undo `refuse_merge`."""
    layer.__dict__.pop("merge", None)


def _refused_merge(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(
        f"merge: PEFT's {type(self).__name__} cannot write into {_shape(self.get_base_layer())}; lora_ops.merge(model) "
        "makes a merged model of dense weights"
    )


def _shape(layer: Any) -> str:
    return f"NF4Linear({layer.in_features}, {layer.out_features})"
