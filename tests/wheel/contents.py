"""What a wheel and an sdist of lora_ops hold, and what they must not."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
LIBRARY = "lora_ops/_liblora_ops.so"
PACKAGES = ("lora_ops", "kernels", "quant")  # of the checkout; the last two are installed below the first
REQUIRED = {"torch>=2.11", "numpy"}
NEEDED_TO_BUILD = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/include/lora_ops.h")


def modules(root: Path = ROOT) -> set[str]:
    """What the package consists of, as it is called once installed, without the native library."""
    found = {"lora_ops/py.typed"}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = path.relative_to(root)
            if not {"kernels", "quant"} & set(name.parts[1:2]):  # lora_ops/kernels is a link to kernels
                found.add(str(name if package == "lora_ops" else Path("lora_ops") / name))
    return found


def files(wheel: Path) -> set[str]:
    """The files of a wheel without those that describe it."""
    names = zipfile.ZipFile(wheel).namelist()
    return {n for n in names if not PurePosixPath(n).parts[0].endswith(".dist-info") and not n.endswith("/")}


def wheel_problems(wheel: Path, platform: str, *, native: bool) -> list[str]:
    """What is wrong with a wheel that is to have this platform's tag, in lines.

    Args:
        platform: the tag's last part, such as linux_x86_64.
        native: whether the C++ library must be in it; if not, it must be absent.
    """
    wrong = []
    expected = modules() | ({LIBRARY} if native else set())
    held = files(wheel)
    wrong += [f"not in the wheel: {name}" for name in sorted(expected - held)]
    wrong += [f"not of the package: {name}" for name in sorted(held - expected)]
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rpartition("/")[0]
        described = {n: archive.read(n) for n in archive.namelist() if n.startswith(f"{info}/")}
        wrong += _record_problems(archive, described[f"{info}/RECORD"].decode())
    tag = f"py3-none-{platform}"
    if not wheel.name.endswith(f"-{tag}.whl"):
        wrong.append(f"name: expected the tag {tag}, got {wheel.name}")
    about = Parser().parsestr(described[f"{info}/WHEEL"].decode())
    if about.get_all("Tag") != [tag] or about["Root-Is-Purelib"] != "false":
        wrong.append(f"WHEEL: expected Tag {tag} and not purelib, got {about.items()}")
    if described.get(f"{info}/licenses/LICENSE") != (ROOT / "LICENSE").read_bytes():
        wrong.append("LICENSE is missing")
    if b"lora-ops = lora_ops.cli:main" not in described.get(f"{info}/entry_points.txt", b""):
        wrong.append("the command lora-ops is missing")
    return wrong + _metadata_problems(described[f"{info}/METADATA"].decode())


def _metadata_problems(text: str) -> list[str]:
    meta = Parser().parsestr(text)
    required = {r for r in meta.get_all("Requires-Dist", []) if "extra ==" not in r}
    expected = {"License-Expression": "Apache-2.0", "Requires-Python": ">=3.10", "Name": "lora_ops"}
    wrong = [f"{name}: expected {value}, got {meta[name]}" for name, value in expected.items() if meta[name] != value]
    if required != REQUIRED:
        wrong.append(f"Requires-Dist: expected {sorted(REQUIRED)}, got {sorted(required)}")
    if not {"triton", "train"} <= set(meta.get_all("Provides-Extra", [])):
        wrong.append("the extras triton and train are missing")
    if "# lora_ops" not in text:
        wrong.append("README.md is missing")
    return wrong


def _record_problems(archive: zipfile.ZipFile, record: str) -> list[str]:
    """RECORD names every file with its hash."""
    rows = {name: digest for name, digest, _ in csv.reader(io.StringIO(record))}
    names = {n for n in archive.namelist() if not n.endswith("/")}
    wrong = [f"RECORD and the archive differ in {name}" for name in sorted(names ^ set(rows))]
    for name in sorted(names & set(rows)):
        if name.endswith(".dist-info/RECORD"):
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if rows[name] != f"sha256={digest}":
            wrong.append(f"RECORD has another hash of {name}")
    return wrong


def sdist_problems(sdist: Path) -> list[str]:
    """What is wrong with an sdist, in lines: it must build everything, and be no copy of the checkout."""
    with tarfile.open(sdist) as archive:
        held = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in archive.getmembers() if m.isfile()}
    csrc = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wrong = [f"not in the sdist: {n}" for n in sorted((modules() | csrc | set(NEEDED_TO_BUILD)) - held)]
    foreign = ("tests/", "bench/", "examples/", "docs/", "findings/", "build/", ".")
    return wrong + [f"not for the sdist: {n}" for n in sorted(held) if n.startswith(foreign) or n.endswith(".so")]
