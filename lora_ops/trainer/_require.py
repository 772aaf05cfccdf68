"""One plain sentence when a package of the `train` extra is missing, instead of a traceback."""

from __future__ import annotations

import importlib.util

TRAIN_PACKAGES = ("transformers", "peft", "trl", "datasets", "accelerate")


def require(*packages: str) -> None:
    """Check that packages can be imported.

    Args:
        packages: top-level package names.

    Raises:
        ImportError: if some are missing; the message names them and the extra that installs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'lora_ops.trainer needs {", ".join(missing)}: install with  pip install "lora_ops[train]"')
