"""The table that chooses between routes on a GPU: where it is read, what a broken file does, and that it is obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_ops.runtime import crossovers as table
from lora_ops.runtime import triton_launch
from lora_ops.runtime.crossovers import DEFAULT, Crossovers, crossovers, force, source, write

GPU, CHIP = torch.device("cuda"), "NVIDIA H200"


@pytest.fixture(autouse=True)
def _chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CHIP)
    monkeypatch.setattr(triton_launch, "_capability_of", lambda device: (9, 0))
    monkeypatch.delenv("LORA_OPS_CROSSOVERS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table._lookup.cache_clear()
    yield
    table._lookup.cache_clear()


def test_without_a_file_the_library_s_own_table_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crossovers(GPU) == DEFAULT
    assert "not measured" in source(CHIP)
    table._lookup.cache_clear()
    monkeypatch.setitem(table.MEASURED, CHIP, Crossovers(kstep_min_m=7))
    assert crossovers(GPU).kstep_min_m == 7
    assert source(CHIP) == "a measurement on such a chip"


def test_what_was_written_is_read_at_once(tmp_path: Path) -> None:
    assert crossovers(GPU) == DEFAULT
    path = table.table_path()
    assert path == tmp_path / "cache" / "lora_ops" / "crossovers.json"
    write(path, "another chip", Crossovers(kstep_min_m=1))
    write(path, CHIP, Crossovers(nf4_gemm_max_m=192))
    assert crossovers(GPU) == Crossovers(nf4_gemm_max_m=192)
    assert str(path) in source(CHIP)
    assert set(json.loads(path.read_text())) == {"another chip", CHIP}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert crossovers(torch.device("cpu")) == DEFAULT


def test_the_variable_names_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(table.table_path(), CHIP, Crossovers(kstep_min_m=1))
    monkeypatch.setenv("LORA_OPS_CROSSOVERS", str(tmp_path / "mine.json"))
    write(table.table_path(), CHIP, Crossovers(kstep_min_m=2))
    assert crossovers(GPU).kstep_min_m == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "expected a JSON object"),
        ('{"NVIDIA H200": {"nf4_gemm_max_m": "many"}}', "expected a number of tokens, got 'many'"),
        ('{"NVIDIA H200": {"gone": 1}}', "gone"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, reason: str
) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("LORA_OPS_CROSSOVERS", str(path))
    with pytest.warns(UserWarning, match=reason) as told:
        assert [crossovers(GPU) for _ in range(3)] == [DEFAULT] * 3
    assert len(told) == 1
    assert str(path) in str(told[0].message)


def test_force_overrides_and_gives_back() -> None:
    with force(kstep_min_m=0):
        with force(kstep_min_m=5, nf4_gemm_max_m=1):
            assert crossovers(GPU) == Crossovers(nf4_gemm_max_m=1, kstep_min_m=5)
        assert crossovers(GPU) == Crossovers(kstep_min_m=0)
    assert crossovers(GPU) == DEFAULT
    with pytest.raises(TypeError, match="kstep"), force(kstep=1):
        pass
