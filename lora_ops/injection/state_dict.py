"""The state dict of a model with NF4 weights, of which torch.distributed takes out what is frozen.

`StateDictOptions(ignore_frozen_params=True)` pops the name of every frozen Parameter. An NF4Linear has Parameters that
stand in its state dict under bitsandbytes' keys: popping them takes these.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from lora_ops.nn import NF4Linear

_UNSET = object()


class StateDict(OrderedDict):
    """What `state_dict()` gives, to which the names of all Parameters are known; pickled as an OrderedDict."""

    keys_of: dict[str, list[str]]  # by name of a Parameter that is no key: the keys that hold it

    def pop(self, key: str, default: Any = _UNSET) -> Any:
        if key not in self and (keys := getattr(self, "keys_of", {}).get(key)):
            return [super(StateDict, self).pop(k, None) for k in keys]
        return super().pop(key) if default is _UNSET else super().pop(key, default)

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {name: value for name, value in vars(self).items() if name != "keys_of"}
        return OrderedDict, (), attributes or None, None, iter(self.items())


def know_nf4_parameters(model: Any) -> None:
    """Have the state dicts of a model, and of those in a PeftModel, know the Parameters of its NF4 layers."""
    inside = (model.base_model, model.get_base_model()) if hasattr(model, "get_base_model") else ()
    for whole in (model, *inside):
        if _named not in whole._state_dict_hooks.values():
            whole._register_state_dict_hook(_named)


def _named(model: nn.Module, state_dict: Any, prefix: str, _: Any) -> StateDict | None:
    if prefix:  # a part of another model's, of which nobody takes the answer
        return None
    found = StateDict(state_dict)
    found.__dict__.update(vars(state_dict))
    found.keys_of = {
        f"{name}.{parameter}".lstrip("."): [f"{name}.{key}".lstrip(".") for key in keys]
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear)
        for parameter, keys in module.state_dict_keys().items()
    }
    return found if found.keys_of else None
