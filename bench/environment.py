"""What a report must say about the machine and the software, without anything that identifies this one's folders."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "bitsandbytes", "peft", "transformers", "liger_kernel", "unsloth")


def versions() -> dict[str, str]:
    """Versions of what is installed, by package."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return found


def cpu_name() -> str:
    """The processor's model name; with its family and model where a hypervisor leaves nothing more than a brand."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    name = match.group(1).strip() if match else platform.machine()
    numbers = [re.search(rf"^{what}\s*:\s*(\d+)$", text, re.MULTILINE) for what in ("cpu family", "model")]
    if re.search(r"\d", name) or not all(numbers):
        return name
    return "{} (family {}, model {})".format(name, *(number.group(1) for number in numbers if number))


def slug(name: str) -> str:
    """A folder name: lower case, words joined by dashes, without marks."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def git_commit() -> str:
    """The checkout's commit, with + if files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """The machine, the software and the moment."""
    from lora_ops.runtime import native

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": None if load is None else round(load, 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.isa() if native.available() else f"none: {native.unavailable_reason()}",
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git_commit(),
        "versions": versions(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = properties.name
        about["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["gpu_capability"] = f"{properties.major}.{properties.minor}"
        about["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
        about["driver"] = driver_version()
    return about


def driver_version() -> str:
    """The GPU driver's version as its tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command_line(module: str, argv: list[str]) -> str:
    """The command as a reader would type it: folders above the checkout are not theirs to know."""
    return " ".join(["python", "-m", module, *(Path(a).name if Path(a).is_absolute() else a for a in argv)])


def without_folders(text: str) -> str:
    """`text` with this machine's folders replaced by what they are."""
    for folder, name in (
        (str(ROOT), "."),
        (sys.prefix, "<python>"),
        (sys.base_prefix, "<python>"),
        (str(Path.home()), "~"),
    ):
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def traceback_text() -> str:
    """The exception being handled."""
    return without_folders(traceback.format_exc())


def exception_line(error: BaseException) -> str:
    """Type and first line of an exception's message."""
    return without_folders(f"{type(error).__name__}: {str(error).split(chr(10))[0]}"[:400])
