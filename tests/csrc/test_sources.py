"""How csrc/cpu is laid out: every header stands alone, and folders include one another one way."""

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cpu"
HEADERS = sorted(SOURCES.rglob("*.h"))
# What a folder may include besides itself, common and isa.
BELOW = {
    "common": set(),
    "isa": set(),
    "nf4": set(),
    "philox": set(),
    "blockwise8": set(),
    "gemm": {"nf4"},
    "lora": {"gemm", "philox"},
    "adamw": {"blockwise8", "philox"},
    "pages": {"adamw"},
}

CROSS_COMPILERS = {"X86": "x86_64-linux-gnu-g++", "ARM64": "aarch64-linux-gnu-g++"}


def flags_of_the_build() -> dict[str, list[str]]:
    """setup.py's constants whose names end with FLAGS, without running it."""
    found: dict[str, list[str]] = {}
    for line in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            name = line.targets[0].id
            if name.endswith("FLAGS") and not name.startswith("CUDA"):
                exec(compile(ast.Module([line], []), "setup.py", "exec"), found)
    return found


def test_headers_were_found() -> None:
    assert len(HEADERS) > 30
    assert {path.parent.name for path in HEADERS} == set(BELOW)


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_header_stands_alone(path: Path) -> None:
    """It includes what it uses, and the flags of the instruction set that it is named after are all that it needs."""
    flags = flags_of_the_build()
    here = {"x86_64": "X86", "amd64": "X86", "aarch64": "ARM64", "arm64": "ARM64"}.get(platform.machine().lower(), "")
    wanted = {isa: name for name in CROSS_COMPILERS for isa in flags[f"{name}_FLAGS"] if path.stem.endswith(isa)}
    target = next(iter(wanted.values()), here)
    compiler = shutil.which("c++" if target == here else CROSS_COMPILERS[target])
    if compiler is None:
        advice = "g++ or clang++" if target == here else CROSS_COMPILERS[target]
        pytest.skip(
            f"no C++ compiler for {path.name}: install {advice}, or run the test on {target or 'another machine'}"
        )
    command = [compiler, *flags["FLAGS"], "-Werror", "-Wno-unused-function", "-fsyntax-only", "-fopenmp"]
    command += [flag for isa in wanted for flag in flags[f"{target}_FLAGS"][isa]]
    command += [f"-DLORA_OPS_{target}"] * bool(target) + [f"-I{SOURCES}", f"-I{ROOT / 'csrc/include'}"]
    done = subprocess.run([*command, "-include", path, "-x", "c++", "/dev/null"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", sorted(BELOW))
def test_folders_include_one_way(folder: str) -> None:
    for path in (SOURCES / folder).iterdir():
        included = set(re.findall(r'#include "(\w+)/', path.read_text()))
        assert included <= {folder, "common", "isa"} | BELOW[folder], path
