"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _open_up(path: Path, bits: int) -> None:
    """Give a temporary path the mode that an ordinary new one would have (tempfile makes them private)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(bits & ~umask)


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block ends well.

    Args:
        path: where the file shall stand. Its folder is made if it is missing.

    Yields:
        The path to write to; it has the suffix of `path`, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _open_up(temporary, 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; move it to `path`, over an older one, when the block ends well.

    Args:
        path: where the folder shall stand.

    Yields:
        The folder to fill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for inside in temporary.rglob("*"):  # safetensors makes its files private as well
            _open_up(inside, 0o777 if inside.is_dir() else 0o666)
        _open_up(temporary, 0o777)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_files_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; move each file in it up, over older ones, when the block ends well.

    Args:
        folder: where the files shall stand; other files in it stay. It is made if it is missing.

    Yields:
        The folder to fill; it is flat.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            _open_up(path, 0o666)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON in one step.

    Args:
        path: the file to write.
        value: anything that `json.dumps` takes. NaN and infinity are refused: they are not JSON.

    Returns:
        The path written.

    Raises:
        ValueError: if `value` holds NaN or infinity.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
