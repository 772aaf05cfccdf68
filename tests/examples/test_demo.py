"""The demo on a tiny model and a tiny library: what it writes, what it returns; and files that appear whole."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl")

from examples.demo import demo, report
from lora_ops.trainer import _files


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, library: Path, tiny_model: Path) -> None:
    """Let the demo run on the tests' library and model."""
    monkeypatch.setattr(demo, "DEMO_MODEL", tiny_model)
    for name in ("instruction_dataset", "instruction_items", "library_files"):
        monkeypatch.setattr(demo, name, partial(getattr(demo, name), root=library))


@pytest.mark.usefixtures("tiny_demo")
def test_demo_writes_its_figures(tmp_path, capsys):
    status = demo.main(["--max_steps", "20", "--output_dir", str(tmp_path / "out"), "--seed", "3"])
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    heldout = result["heldout"]

    rows = heldout["items"]
    entry = heldout["losses"]["all"]
    assert entry["before"] == pytest.approx(sum(row["before"] for row in rows) / len(rows))
    assert entry["interval"]["mean"] == pytest.approx(entry["after"] - entry["before"])
    assert status == (0 if entry["interval"]["high"] < 0 else 1)
    assert status == 0, "a fresh model learns the form of the answers within 20 steps"
    assert result["training"]["steps"] == 20
    assert len(result["training"]["loss_curve"]) == 4
    assert len(result["answers"]) == 2
    assert result["adapter"]["bytes"] == (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result["adapter"]["parameters"] == 16 * (4 * (64 + 64) + 3 * (64 + 128))  # r x (in + out), all linear layers
    assert result["memory"]["weights_quantized"] < result["memory"]["weights_fp32"]
    assert {row["op"] for row in result["trace"]}, "lora_ops ops ran in training"
    assert {row["name"] for row in result["layers"]}

    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "result.json", "loss_curve.png"}
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "tokens/s" in printed


def test_demo_fails_when_the_loss_does_not_clearly_fall(monkeypatch, capsys, tmp_path):
    for high, status in ((-0.1, 0), (0.1, 1)):
        result = {"heldout": {"losses": {"all": {"interval": {"high": high}}}}}
        monkeypatch.setattr(demo, "run", lambda *_, answer=result, **__: answer)
        assert demo.main(["--output_dir", str(tmp_path)]) == status
    assert "did not clearly fall" in capsys.readouterr().out


def test_wrong_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--max_steps", "0"])
    assert "--max_steps: expected at least 1, got 0" in capsys.readouterr().err


def test_comparison_by_kind_is_clustered_by_module():
    items = [{"kind": kind, "module": module} for kind in ("a", "b") for module in "xyz"] + [
        {"kind": "c", "module": "x"}
    ]
    losses = report.compare(items, [2.0] * 7, [1.0, 1.1, 1.2, 2.0, 2.1, 1.9, 0.0])
    assert list(losses) == ["all", "a", "b"]  # a single module gives no error bar
    assert losses["a"]["excludes_zero"]
    assert not losses["b"]["excludes_zero"]
    assert losses["all"]["interval"]["clusters"] == 3
    assert "all items" in report.loss_table(losses)


def _write_half(writer):
    with writer as temporary:
        half = temporary / "file" if temporary.is_dir() else temporary
        half.write_text("half", encoding="utf-8")
        raise InterruptedError("the writer's process had enough")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "value.json"
    _files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        _files.write_json(path, {"a": math.nan})
    with pytest.raises(InterruptedError):
        _write_half(_files.replacing_file(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with _files.replacing_dir(folder) as temporary:
            (temporary / "file").write_text(text, encoding="utf-8")
    with pytest.raises(InterruptedError):
        _write_half(_files.replacing_dir(folder))
    assert (folder / "file").read_text(encoding="utf-8") == "two"
    assert list(tmp_path.iterdir()) == [folder]


def test_files_move_into_a_folder_beside_others(tmp_path):
    (tmp_path / "stays").write_text("", encoding="utf-8")
    with _files.replacing_files_in(tmp_path) as temporary:
        (temporary / "new").write_text("", encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"stays", "new"}
