"""The instruction data: the same everywhere, split without overlap, in TRL's format."""

from __future__ import annotations

import json

import pytest

from examples.demo.base_model import DEMO_MODEL
from examples.demo.data import KINDS, functions_in, functions_of, instruction_dataset, instruction_items
from examples.demo.stdlib import SPLITS, SourceFile, library_files, split_of, top_module


def test_split_is_a_function_of_the_name_alone():
    # Frozen: the shipped base model was trained on this split, so a changed hash would leak held-out modules to it.
    assert [split_of(name) for name in ("asyncio", "json", "collections")] == ["base", "train", "heldout"]
    assert split_of("json.decoder") == split_of("json")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("json/decoder.py", "json"),
        ("datetime.py", "datetime"),
        ("_pydatetime.py", "datetime"),
        ("pathlib/__init__.py", "pathlib"),
        ("__future__.py", "future"),
        ("py_compile.py", "py_compile"),
    ],
)
def test_twins_of_a_module_fall_on_the_same_side(path, name):
    assert top_module(path) == name


def test_splits_are_disjoint_and_complete(library):
    files = {split: {file.path for file in library_files(library, split)} for split in SPLITS}
    assert all(files.values())
    assert sum(map(len, files.values())) == len(set().union(*files.values())) == len(library_files(library))


def test_tests_tables_and_undecodable_files_are_left_out(library):
    paths = {file.path for file in library_files(library)}
    assert "package/inner.py" in paths
    assert not paths & {"package/test/test_it.py", "_sysconfigdata_x.py", "latin.py"}


def test_functions_of_a_file():
    file = SourceFile(
        "m.py",
        "m",
        'def add(a, b=1, *rest, c, **d):\n    """Add two numbers.\n\n    Slowly.\n    """\n'
        'class K:\n    async def run(self) -> None:\n        """Run until the end."""\n'
        '    def quiet(self): ...\n\ndef short():\n    """Tiny."""\n',
    )
    found = [(f.name, f.signature, f.summary) for f in functions_of(file)]
    assert found == [
        ("add", "def add(a, b=1, *rest, c, **d)", "Add two numbers."),
        ("K.run", "async def run(self)", "Run until the end."),
    ]
    assert functions_of(SourceFile("b.py", "b", "def (:")) == []


def test_a_summary_of_an_earlier_split_is_not_asked_again(library, tmp_path):
    names = {split: next(f for f in library_files(library, split)).path for split in SPLITS}
    for name in names.values():
        (tmp_path / name).write_text('def same():\n    """The very same words."""\n', encoding="utf-8")
    assert [len(functions_in(split, tmp_path)) for split in SPLITS] == [1, 0, 0]


def test_items_are_the_same_each_time(library):
    first = instruction_items("train", root=library)
    assert first == instruction_items("train", root=library)
    assert first[:5] == instruction_items("train", max_items=5, root=library)
    assert {item["kind"] for item in first} == set(KINDS)


def test_dataset_is_in_prompt_completion_format(library):
    pytest.importorskip("datasets")
    dataset = instruction_dataset("heldout", root=library)
    assert {"prompt", "completion", "kind", "file", "module"} == set(dataset.column_names)
    for row in dataset:
        assert row["prompt"].endswith("\nAnswer:\n")
        assert row["completion"] == row["completion"].strip() != ""
        assert split_of(row["module"]) == "heldout"
        if row["kind"] != "describe":
            assert row["completion"] not in row["prompt"]


def test_the_running_library_gives_enough_of_each_split():
    items = {split: instruction_items(split) for split in SPLITS}
    assert len(items["train"]) > 1500
    assert len(items["heldout"]) > 600
    modules = {split: {item["module"] for item in items[split]} for split in SPLITS}
    assert len(modules["heldout"]) >= 10
    assert not modules["heldout"] & (modules["base"] | modules["train"])


def test_the_shipped_base_model_saw_no_module_of_the_other_splits():
    record = json.loads((DEMO_MODEL / "training.json").read_text(encoding="utf-8"))
    assert {split_of(name) for name in record["modules"]} == {"base"}


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"split: expected one of base, train, heldout, got 'test'"):
        library_files(split="test")
    with pytest.raises(ValueError, match=r"max_items: expected a positive number or None, got 0"):
        instruction_items("train", max_items=0)
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        library_files(tmp_path)
