"""The command `lora-ops`: what works on this machine, what is missing and what that costs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform

import torch

from lora_ops.runtime import crossovers, machine, native
from lora_ops.runtime.backends import BACKENDS, current_backend
from lora_ops.version import __version__

EXTRAS = {
    "train": ("transformers", "peft", "trl", "datasets", "accelerate", "matplotlib"),
    "triton": ("triton",),
    "test": ("bitsandbytes", "hypothesis", "pytest", "pytest_benchmark"),
}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def doctor() -> str:
    """A report of versions, devices, backends and extras, one finding a line."""
    lines = [f"lora_ops {__version__}, Python {platform.python_version()}, torch {torch.__version__}"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines += [f"GPU      {gpu}", f"CPU      {platform.machine()}, {torch.get_num_threads()} threads"]
    for dtype in machine.DTYPES_16BIT:
        if reason := machine.slow_16bit_reason(dtype):
            lines.append(f"{'':<8} slow: {reason}: {machine.SLOW_16BIT_REMEDY}")
    lines += ["", f"backends (in use: {current_backend()})"]
    for backend in BACKENDS.values():
        reason = backend.unavailable()
        if reason is None and backend.device_types == ("cuda",) and not torch.cuda.is_available():
            reason = "no GPU"
        if reason is None:
            note = f"instruction set {native.isa()}" if backend.name == "native" else ""
            lines.append(f"  ok       {backend.name:<10} {note}".rstrip())
        else:
            cost = "" if reason == "no GPU" else f"\n{'':>22}costs: {backend.cost}"
            remedy = f"\n{'':>22}to do: {native.REMEDY}" if native.BUILD_HINT in reason else ""
            lines.append(f"  missing  {backend.name:<10} {reason}{cost}{remedy}")
    if torch.cuda.is_available():
        lines.append(f"routes by {crossovers.source(gpu)}; `python3 -m bench.gpu --tune` in a checkout measures them")
    lines += ["", "extras"]
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        lines.append(f"  {'missing' if missing else 'ok':<8} {extra:<10} {found}")
        if missing:
            lines.append(f"{'':>22}without {', '.join(missing)}: pip install 'lora_ops[{extra}]'")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="lora-ops", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what works on this machine, what is missing and what that costs")
    parser.parse_args(argv)
    print(doctor())
    return 0
