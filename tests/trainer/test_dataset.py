"""Training sets from files as people have them: encodings, compression, halves of files, saved folders."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets

from lora_ops.trainer.dataset import load_dataset

ROWS = [{"prompt": "grüß", "completion": " gott"}, {"prompt": "b", "completion": " c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\ngrüß, gott\nb, c\n"
BOM = b"\xef\xbb\xbf"

EQUAL = {
    "bom.jsonl": BOM + LINES.encode(),
    "bom.csv": BOM + TABLE.encode(),
    "bom.json": BOM + json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "UPPER.JSONL": LINES.encode(),
    "UPPER.Csv": TABLE.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "crlf.csv": TABLE.replace("\n", "\r\n").encode(),
    "spaced.jsonl": LINES.replace("\n", "\n\n").encode(),
    "no_last_newline.jsonl": LINES.rstrip().encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.JSON.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "packed.csv.bz2": bz2.compress(TABLE.encode()),
    "packed.jsonl.xz": lzma.compress(BOM + LINES.encode()),
    "several.dots.v1.jsonl": LINES.encode(),
}


@pytest.mark.parametrize("name", EQUAL)
def test_the_same_rows_from_every_way_of_writing_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(EQUAL[name])
    assert load_dataset(str(tmp_path / name)).to_list() == ROWS


def _parquet() -> bytes:
    import io

    file = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.jsonl", LINES.encode("utf-16"), r"expected UTF-8, got UTF-16 in .*u.jsonl; convert it"),
        ("u.csv", TABLE.encode("utf-16-le"), "expected UTF-8, got UTF-16 or UTF-32"),
        ("u.json", json.dumps(ROWS).encode("utf-32"), "expected UTF-8, got UTF-32"),
        ("u.jsonl.gz", gzip.compress(LINES.encode("utf-16")), "expected UTF-8, got UTF-16"),
        ("l.csv", TABLE.encode("latin-1"), "expected UTF-8, got the byte 0xfc in line 2 of"),
        ("l.jsonl", ("{}\n" + LINES).encode("latin-1"), "expected UTF-8, got the byte 0xfc in line 2 of"),
        ("e.jsonl", b"", "e.jsonl is empty"),
        ("e.csv", b" \n\n", "e.csv is empty"),
        ("e.json", BOM, "e.json is empty"),
        ("e.jsonl.gz", gzip.compress(b""), "e.jsonl.gz is empty"),
        ("none.json", b"[]", "expected at least one row, got none"),
        ("none.csv", b"prompt,completion\n", "expected at least one row, got none"),
        ("half.jsonl", LINES.encode()[:-9], r"cannot read .*half.jsonl: line 2: Unterminated string"),
        ("half.json", json.dumps(ROWS, indent=0).encode()[:-9], r"cannot read .*half.json: line \d+: "),
        ("mid.jsonl", ("\n" + LINES + '{"prompt"\n' + LINES).encode(), r"mid.jsonl: line 4: Expecting ':'"),
        ("half.csv", TABLE.encode() + b'"d, e\nf', r"cannot read .*half.csv: line \d: unexpected end of data"),
        ("short.csv", TABLE.encode() + b"d", r"completion is null in 1 of 3 rows \(row 3\)"),
        ("wide.csv", TABLE.encode() + b"d,e,f\n", "line 4 has 3 fields where the first line has 2"),
        ("twice.csv", b"prompt,prompt\na,b\n", "named twice: prompt; rename them"),
        ("half.jsonl.gz", gzip.compress(LINES.encode())[:-12], r"cannot unpack .*half.jsonl.gz"),
        ("half.jsonl.xz", lzma.compress(LINES.encode())[:-12], r"cannot unpack .*half.jsonl.xz"),
        ("not.csv.gz", TABLE.encode(), r"cannot unpack .*not.csv.gz"),
        ("half.parquet", _parquet()[:-20], r"cannot read .*half.parquet"),
        ("text.parquet", LINES.encode(), r"cannot read .*text.parquet"),
        ("data.jsonl.zip", b"PK", r"expected a file ending in .json, .jsonl, .csv, .parquet, .*got data.jsonl.zip"),
        ("data", b"x", "expected a file ending in"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_dataset(str(tmp_path / name))
    assert str(refused.value).startswith("dataset: ")


def test_cells_of_a_table_are_text(tmp_path: Path) -> None:
    """pandas would make numbers of answers that are digits, and nulls of those that read None, NA or nan."""
    path = tmp_path / "labels.csv"
    path.write_text("prompt,completion\n1.0,007\nb,None\nNA,nan\n", encoding="utf-8")
    assert [tuple(row.values()) for row in load_dataset(str(path)).select_columns(["prompt", "completion"])] == [
        ("1.0", "007"), ("b", "None"), ("NA", "nan"),
    ]  # fmt: skip


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select([0]), "rest": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_dataset(str(tmp_path / "one")).to_list() == ROWS
    assert load_dataset(str(tmp_path / "two"), "rest").to_list() == ROWS[1:]
    with pytest.raises(ValueError, match="dataset_split: expected one of train, rest, got 'test'"):
        load_dataset(str(tmp_path / "two"), "test")


def test_a_split_that_a_file_has_not(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(LINES, encoding="utf-8")
    with pytest.raises(ValueError, match=r'dataset_split: Unknown split "test"'):
        load_dataset(str(tmp_path / "data.jsonl"), "test")
    assert len(load_dataset(str(tmp_path / "data.jsonl"), "train[:1]")) == 1


@pytest.mark.parametrize("name", ["/nowhere/data", "./nowhere", "/nowhere/data.jsonl", "~/nowhere"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"dataset: there is no file (or folder )?{name}"):
        load_dataset(name)


def test_a_name_that_the_hub_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub\nor cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match=r"dataset: cannot load 'a/b' \(Dataset 'a/b' doesn't exist on the Hub or"):
        load_dataset("a/b")
