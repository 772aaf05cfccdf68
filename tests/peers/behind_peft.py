"""A pytest plugin that puts `lora_ops.inject` behind PEFT's API: whatever makes or loads LoRA adapters is injected.

Loaded by `python -m tests.peers` into runs of PEFT's own tests, before they import peft's names.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest

import lora_ops
from lora_ops.injection import peft_layers

_calls: Counter[str] = Counter()


def _injected(model: Any) -> Any:
    """The model, whose LoRA layers are ours where they can be; other tuners stay what they are."""
    if isinstance(getattr(model, "base_model", None), peft.tuners.lora.LoraModel):
        lora_ops.inject(model)
    return model


def _then_inject(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _injected(function(*args, **kwargs))

    return call


def _count(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _calls["fused forwards"] += 1
        return function(*args, **kwargs)

    return call


def pytest_configure(config: pytest.Config) -> None:
    peft.get_peft_model = peft.mapping_func.get_peft_model = _then_inject(peft.mapping_func.get_peft_model)
    for cls in (peft.PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        if "from_pretrained" in vars(cls):
            cls.from_pretrained = classmethod(_then_inject(vars(cls)["from_pretrained"].__func__))
    peft_layers._fused = _count(peft_layers._fused)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not pass with PEFT alone."""
    passed = set(json.loads(Path(os.environ["LORA_OPS_PEERS_ONLY"]).read_text()))
    left_out = [item for item in items if _junit_name(item) not in passed]
    items[:] = [item for item in items if _junit_name(item) in passed]
    config.hook.pytest_deselected(items=left_out)


def _junit_name(item: pytest.Item) -> str:
    """A test as the junit file names it, by which its outcome is known."""
    path, *classes, name = item.nodeid.split("[")[0].split("::")
    parameters = item.nodeid[len("::".join([path, *classes, name])) :]
    return f"{'.'.join([path.removesuffix('.py').replace('/', '.'), *classes])}::{name}{parameters}"


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = os.environ.get("LORA_OPS_PEERS_COUNTS")  # one file a worker
    if folder:
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(_calls))
