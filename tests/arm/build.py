"""The library, its driver and its fuzzer for 64-bit ARM, by Debian's cross compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build/arm"
LIBRARY, DRIVER, FUZZ = OUT / "lora_ops/_liblora_ops.so", OUT / "driver", OUT / "fuzz"
DRIVER_SOURCE, FUZZ_SOURCE = ROOT / "tests/arm/driver.cpp", ROOT / "tests/csrc/fuzz/fuzz.cpp"
COMPILER = ["aarch64-linux-gnu-g++"]
RUN = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
PACKAGES = {COMPILER[0]: "g++-aarch64-linux-gnu", RUN[0]: "qemu-user"}
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/include'}"]


def missing() -> str | None:
    """What this machine lacks, in words for somebody who can install it, or None."""
    if packages := [package for tool, package in PACKAGES.items() if shutil.which(tool) is None]:
        return f"no {' and no '.join(packages)}: on Debian or Ubuntu, apt-get install {' '.join(packages)}"
    return None


def stale() -> str | None:
    """Why what was built cannot be used, or None."""
    built = [path.stat().st_mtime for path in (LIBRARY, DRIVER) if path.exists()]
    sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py", DRIVER_SOURCE]
    if len(built) < 2 or max(path.stat().st_mtime for path in sources) > min(built):
        return "not built, or older than its sources: make arm"
    return None


def _run(command: list[str], **env: str) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | env, check=True)


def build() -> None:
    """The library as setup.py builds it, and what calls it."""
    out = ["--build-lib", str(OUT), "--build-temp", str(OUT / "objects")]
    env = {
        "CXX": shlex.join(COMPILER),
        "CXXFLAGS": "-Werror",
        "LORA_OPS_REQUIRE_NATIVE": "1",
        "LORA_OPS_BUILD_CUDA": "0",
    }
    _run([sys.executable, "setup.py", "--quiet", "build_ext", *out], **env)
    _run([*COMPILER, *FLAGS, str(DRIVER_SOURCE), "-ldl", "-o", str(DRIVER)])
    rpath = f"-Wl,-rpath,{LIBRARY.parent}"
    _run([*COMPILER, *FLAGS, str(FUZZ_SOURCE), str(LIBRARY), rpath, "-o", str(FUZZ)])
