"""An sdist, and a wheel from it. No compiler is needed for a wheel without the native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.wheel.contents import ROOT

CHECKOUT = ("lora_ops", "kernels", "quant", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
NO_COMPILER = "no-c++-compiler"


def copy_checkout(to: Path) -> Path:
    """What packages are built from, without what earlier builds left: setuptools would pack it."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    to.mkdir(parents=True)
    for name in CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=skip)
        else:
            shutil.copy2(source, to / name)
    # Beside it in a checkout, and of no package's.
    for name in ("tests", "bench", "examples"):
        (to / name).mkdir()
        shutil.copy2(ROOT / "tests/__init__.py", to / name / "__init__.py")
    return to


def _build(kind: str, tree: Path, out: Path, suffix: str, **env: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    settings = os.environ | {"LORA_OPS_BUILD_CUDA": "0"} | env
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=tree,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (out / f"{kind}.log").write_text(done.stdout)
    if done.returncode:
        raise RuntimeError(f"the {kind} was not built:\n{done.stdout[-3000:]}")
    (built,) = out.glob(f"*{suffix}")
    return built


def build_sdist(tree: Path, out: Path) -> Path:
    return _build("sdist", tree, out, ".tar.gz")


def build_wheel(tree: Path, out: Path, **env: str) -> Path:
    """Of the sources in `tree`; `env` goes to setup.py, as CXX=NO_COMPILER."""
    return _build("wheel", tree, out, ".whl", **env)


def unpack(sdist: Path, to: Path) -> Path:
    """The folder in it."""
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(to, filter="data")
        else:
            archive.extractall(to)
    (tree,) = to.iterdir()
    return tree
