"""Training sets from files, saved folders and the Hub; what cannot be read is named with its line."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ops.trainer._require import require
from lora_ops.trainer._say import one_line
from lora_ops.trainer.rows import to_trl_format

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MARKS = {  # longer ones first: that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def load_dataset(dataset: str, split: str = "train") -> Dataset:
    """Load a training set and bring it into a format that TRL knows.

    Args:
        dataset: a .json, .jsonl or .csv file, also compressed (.gz, .bz2, .xz), a .parquet file, a folder written by
            `save_to_disk`, or a Hub name.
        split: which split of it.

    Returns:
        The dataset, with the columns prompt and completion, or messages, or text, and those that TRL takes with them.

    Raises:
        ValueError: if the file is missing, of another kind, empty, cut off or not in UTF-8, or the rows cannot be
            used; the message names the line or the rows.
        ImportError: if `datasets` is not installed.
    """
    require("datasets")
    path = Path(dataset)
    kind, opener = _kind(path)
    if kind is not None:
        return to_trl_format(_from_file(path, kind, opener, split))
    if path.is_file():
        raise ValueError(
            f"dataset: expected a file ending in {', '.join(_READERS)}, the first three also with "
            f"{', '.join(_OPENERS)}; got {path.name}"
        )
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~"))):
        raise ValueError(f"dataset: there is no file or folder {dataset}")
    return to_trl_format(_from_folder_or_hub(path, dataset, split))


def _kind(path: Path) -> tuple[str | None, Callable[..., Any]]:
    """The reader for a file name and what opens it; None if the name is of no known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    opener = _OPENERS.get(suffixes[-1])
    if opener is None:
        return _READERS.get(suffixes[-1]), open
    kind = _READERS.get(suffixes[-2]) if len(suffixes) > 1 else None
    return (None if kind == "parquet" else kind), opener


def _from_file(path: Path, kind: str, opener: Callable[..., Any], split: str) -> Dataset:
    import datasets

    if not path.is_file():
        raise ValueError(f"dataset: there is no file {path}")
    options: dict[str, Any] = {}
    try:
        if kind != "parquet":
            _check_text(path, opener)
        if kind == "csv":
            options = _csv_options(path, opener)
        if kind == "json" and _has_byte_order_mark(path, opener):
            options = {"encoding": "utf-8-sig"}  # datasets before 5.2 takes the mark for a part of an array
        with _without_log_lines():
            return datasets.load_dataset(kind, data_files=str(path), split=split, **options)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"dataset: cannot unpack {path}: {one_line(error)}; write it again") from error
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        if str(error).startswith("dataset"):
            raise
        if _is_about_split(error):
            raise ValueError(f"dataset_split: {one_line(error)}") from error
        if "corresponds to no data" in str(error):
            raise ValueError(f"dataset: expected at least one row, got none in {path}") from error
        place = {"json": _bad_json, "csv": _bad_csv}.get(kind, lambda *_: None)(path, opener)
        cause = place or one_line(error.__cause__ or error)
        raise ValueError(f"dataset: cannot read {path}: {cause}; mend it or write it again") from error


def _is_about_split(error: Exception) -> bool:
    return str(error).startswith(("Unknown split", "Bad split", "Unrecognized instruction"))


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """datasets logs what it raises: said twice, and without the line's number."""
    from datasets.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _has_byte_order_mark(path: Path, opener: Callable[..., Any]) -> bool:
    with opener(path, "rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def _check_text(path: Path, opener: Callable[..., Any]) -> None:
    """Raise if a file is empty or not in UTF-8; readers of datasets and pandas take some of this without a word."""
    with opener(path, "rb") as file:
        head = file.read(4)
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
        if encoding is None and b"\0" in head:
            encoding = "UTF-16 or UTF-32"
        if encoding is not None:
            raise ValueError(
                f"dataset: expected UTF-8, got {encoding} in {path}; convert it, for example: "
                f"iconv -f {encoding.split()[0]} -t UTF-8"
            )
        file.seek(0)
        blank = True
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"dataset: expected UTF-8, got the byte 0x{line[error.start]:02x} in line {number} of {path}; "
                    "convert it, for example: iconv -f WINDOWS-1252 -t UTF-8"
                ) from error
            blank = blank and not line.strip().removeprefix(codecs.BOM_UTF8)
        if blank:
            raise ValueError(f"dataset: {path} is empty")


def _csv_options(path: Path, opener: Callable[..., Any]) -> dict[str, Any]:
    """All columns are text: "007" and "None" are answers like others. Cells that are not there are null."""
    from datasets import Features, Value

    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"dataset: columns of {path} are named twice: {', '.join(twice)}; rename them")
    # pandas names a column without a name by its place.
    features = Features({name or f"Unnamed: {place}": Value("string") for place, name in enumerate(names)})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _bad_json(path: Path, opener: Callable[..., Any]) -> str | None:
    with opener(path, "rt", encoding="utf-8-sig") as file:
        whole = next(line for line in file if line.strip()).lstrip().startswith("[")
        file.seek(0)
        number = 0
        try:
            if whole:
                json.load(file)
            for line in file:
                number += 1
                if line.strip():
                    json.loads(line.strip())
        except json.JSONDecodeError as error:
            return f"line {number or error.lineno}: {error.msg}"
    return None


def _bad_csv(path: Path, opener: Callable[..., Any]) -> str | None:
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            width = len(next(reader, []))
            for row in reader:
                if len(row) > width:
                    return f"line {reader.line_num} has {len(row)} fields where the first line has {width}"
        except csv.Error as error:
            return f"line {reader.line_num}: {error}"
    return None


def _from_folder_or_hub(path: Path, name: str, split: str) -> Dataset:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            if split not in saved:
                raise ValueError(f"dataset_split: expected one of {', '.join(saved)}, got {split!r}")
            return saved[split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, split=split)
    except ValueError as error:
        if str(error).startswith("dataset_split"):
            raise
        argument = "dataset_split" if _is_about_split(error) else "dataset"
        raise ValueError(f"{argument}: {one_line(error)}") from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"dataset: cannot load {name!r} ({one_line(error)}); name a file, a folder of save_to_disk, or a dataset "
            "on the Hub that this machine can reach"
        ) from error
