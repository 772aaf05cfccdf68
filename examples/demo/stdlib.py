"""The running Python's own standard library as a text corpus, split so that nothing is seen twice.

The unit of the split is the top-level module (`json`, `asyncio`, `datetime`): all files of a package fall on the
same side, and so do a module and its pure-Python twin (`datetime.py`, `_pydatetime.py`) or a module that became a
package in a later Python (`pathlib.py`, `pathlib/__init__.py`). The side is a hash of the name, so it is the same
on every machine and for every Python version; the shipped base model never saw a module that is held out.
"""

from __future__ import annotations

import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["base", "train", "heldout"]
SPLITS: tuple[Split, ...] = ("base", "train", "heldout")

# Share of the hash range that goes to each split: (split, upper end).
_BOUNDS: tuple[tuple[Split, float], ...] = (("base", 0.55), ("train", 0.85), ("heldout", 1.0))

# Not library code: tests, tools for humans, generated tables, other people's packages.
_SKIPPED_DIRS = frozenset(
    {
        *("test", "tests", "idle_test", "idlelib", "turtledemo"),
        *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3"),
        *("encodings", "pydoc_data", "__phello__", "__pycache__"),
    }
)
# Written by the machine's installer and full of its paths, not part of CPython's Lib/.
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class SourceFile:
    """One standard-library file: its path inside the library ("json/decoder.py"), its module's name and its text."""

    path: str
    module: str
    text: str

    @property
    def split(self) -> Split:
        """The split that this file's top-level module belongs to."""
        return split_of(self.module)


def top_module(path: str) -> str:
    """Name the top-level module of a library file, the same for a module and its pure-Python twin.

    Args:
        path: path inside the standard library with forward slashes, as in "json/decoder.py".

    Returns:
        The name that decides the split: "json" for "json/decoder.py", "datetime" for "_pydatetime.py".
    """
    name = path.split("/")[0].removesuffix(".py")
    bare = name.removeprefix("_py") if name.startswith("_py") else name
    return bare.strip("_") or name


def split_of(module: str) -> Split:
    """Say which split a module belongs to, from a hash of its name alone.

    Args:
        module: a dotted module name, as in "json.decoder".

    Returns:
        "base", "train" or "heldout".
    """
    name = top_module(module.split(".")[0])
    digest = hashlib.sha256(f"lora_ops:{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in _BOUNDS if place < end)


def _wanted(path: Path) -> bool:
    folders = path.parts[:-1]
    if any(part in _SKIPPED_DIRS or part.startswith("config-") for part in folders):
        return False
    return not path.name.startswith(_SKIPPED_PREFIXES)


@lru_cache(maxsize=4)
def _read_library(root: Path) -> tuple[SourceFile, ...]:
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _wanted(inside):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few old files are Latin-1 or unreadable; they are no loss
            continue
        module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        files.append(SourceFile(inside.as_posix(), module, text))
    return tuple(files)


def library_files(root: str | Path | None = None, split: Split | None = None) -> list[SourceFile]:
    """Read the standard library's pure-Python source files, in the order of their paths.

    Args:
        root: folder of the library; the running Python's own when None.
        split: keep only this split's files; all of them when None.

    Returns:
        The files. Tests, generated tables and installed packages are left out.

    Raises:
        ValueError: if `split` is unknown.
        FileNotFoundError: if there are no sources at `root` (some Pythons ship only bytecode or a zip file).
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    place = Path(root if root is not None else sysconfig.get_path("stdlib")).resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = _read_library(place)
    if not files:
        raise FileNotFoundError(f"root: no Python sources in {place}; this Python ships without its library's sources")
    return [file for file in files if split is None or file.split == split]
