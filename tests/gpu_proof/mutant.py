"""Modules broken on purpose: what the harness must catch."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module with each `old` in its source replaced by `new`; ValueError if it holds no `old`.

    Written to a file of `folder`, since Triton reads kernels from their source.
    """
    source = inspect.getsource(module)
    for old, new in changes:
        if old not in source:
            raise ValueError(f"{module.__name__} holds no {old!r}: change the mutant with it")
        source = source.replace(old, new)
    name = f"mutant_{abs(hash((module.__name__, changes)))}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    sys.modules[name] = broken  # dataclasses look their module up
    spec.loader.exec_module(broken)
    return broken
