"""What a user can get wrong on the command line: status 2 and one line that names the argument."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from lora_ops.trainer import sft

Main = Callable[..., tuple[int, str, str]]


def _line(outcome: tuple[int, str, str], status: int = 2) -> str:
    """The only line that was printed."""
    code, out, err = outcome
    assert code == status, err
    assert "Traceback" not in err
    line, *others = err.splitlines()
    assert not others
    assert "mean loss" not in out
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learning=1", "--learning: unknown argument; did you mean --learning_rate"),
        ("--max_step=1", "--max_step: unknown argument; did you mean --max_steps"),
        ("--lora_rank=4", "--lora_rank: unknown argument; did you mean --lora_"),
        ("--xyzzy", "--xyzzy: unknown argument; expected one of "),
        ("--max_steps=many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("--lora_r=1.5", "argument --lora_r/--lora-r: invalid int value: '1.5'"),
        ("--bf16=maybe", "argument --bf16: Truthy value expected: got maybe"),
    ],
)
def test_names_are_taken_in_full(flag: str, message: str, sft_main: Main) -> None:
    assert _line(sft_main(flag)).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_train_epochs", "-1", "a positive number, got -1.0"),
        ("num_train_epochs", "0", "a positive number, got 0.0"),
        ("num_train_epochs", "nan", "a positive number, got nan"),
        ("num_train_epochs", "inf", "a positive number, got inf"),
        ("learning_rate", "inf", "a positive number, got inf"),
        ("learning_rate", "-1e-4", "a positive number, got -0.0001"),
        ("warmup_steps", "-5", "0 or more, got -5"),
        ("weight_decay", "-0.1", "0 or more, got -0.1"),
        ("weight_decay", "nan", "0 or more, got nan"),
        ("max_grad_norm", "-1", "0 or more, got -1.0"),
        ("save_steps", "-2", "0 or more, got -2"),
        ("logging_steps", "0", "at least 1, got 0"),
        ("max_length", "0", "at least 1, got 0"),
        ("max_steps", "-2", "a positive number or -1, got -2"),
        ("seed", "-1", "a number in [0, 2^32), got -1"),
        ("seed", str(2**32), "a number in [0, 2^32), got 4294967296"),
        ("output_dir", "", "a name, got ''"),
        ("target_modules", " , ", "a name, got ' , '"),
    ],
)
def test_senseless_values_are_refused(name: str, value: str, expected: str, sft_main: Main) -> None:
    assert _line(sft_main(**{name: value})) == f"{name}: expected {expected}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr_scheduler_type", "cosin", "'cosin' is unknown; did you mean cosine?"),
        ("lr_scheduler_type", "xyzzy", "'xyzzy' is unknown; expected one of linear, cosine, "),
        ("lr_scheduler_type", "cosine_with_min_lr", "'cosine_with_min_lr' needs settings that cannot be"),
        ("lr_scheduler_type", "warmup_stable_decay", "'warmup_stable_decay' needs settings that cannot be"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "'reduce_lr_on_plateau' goes by an evaluation"),
        ("report_to", "tensorbord", "'tensorbord' is unknown; did you mean tensorboard?"),
        ("optim", "adamw_8bits", "'adamw_8bits' is unknown; did you mean adamw_8bit"),
        ("max_length", "100000", "expected at most "),
        ("dataset_split", "tran", 'Unknown split "tran"'),
        ("dataset", "./nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("resume_from_checkpoint", "last", "there is no whole checkpoint in "),
    ],
)  # fmt: skip
def test_unknown_names_are_told_with_the_known_ones(name: str, value: str, message: str, sft_main: Main) -> None:
    assert _line(sft_main(**{name: value})).startswith(f"{name}: {message}")


def test_a_reporting_integration_that_is_not_installed(sft_main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations

    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert _line(sft_main(report_to="wandb")) == "report_to: wandb is not installed; install it, or set report_to none"


def test_an_output_dir_that_takes_no_files(sft_main: Main, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert _line(sft_main(output_dir=tmp_path / "file")) == (
        f"output_dir: expected a folder, got the file {tmp_path / 'file'}; name another"
    )
    for place in (tmp_path / "file" / "below", Path("/proc/below")):
        assert _line(sft_main(output_dir=place)).startswith(f"output_dir: cannot write to {place} (")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json", "all"])
def test_a_model_that_cannot_be_loaded(lost: str, sft_main: Main, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if lost == "all":
        folder.mkdir()
    else:
        shutil.copytree(tiny_model, folder)
        (folder / lost).write_bytes((folder / lost).read_bytes()[:40])
    line = _line(sft_main(model_name_or_path=folder))
    assert line.startswith(
        f"model_name_or_path: cannot load '{folder}' as a causal language model with its tokenizer ("
    )
    assert line.endswith("name a folder with config.json, safetensors weights and a tokenizer, or a Hub model")


def test_a_model_of_another_kind(sft_main: Main, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    hf.ViTModel(config).save_pretrained(tmp_path / "vit")
    line = _line(sft_main(model_name_or_path=tmp_path / "vit"))
    assert "as a causal language model with its tokenizer (Unrecognized configuration class" in line
    assert len(line) < 800


def test_modules_that_the_model_has_not(sft_main: Main) -> None:
    assert "no_such_proj" in _line(sft_main(target_modules="no_such_proj"))


def test_any_other_error_is_one_line_and_a_traceback_on_request(
    sft_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond " + "x" * 999)

    monkeypatch.setattr(sft, "load_model", broken)
    line = _line(sft_main(), status=1)
    assert line.startswith("RuntimeError: first second xxx")
    assert line.endswith("x ... (--traceback shows where)")
    assert len(line) < 500
    status, _, err = sft_main("--traceback")
    assert status == 1
    assert err.startswith("Traceback (most recent call last)")
    assert "in broken" in err


def test_help_tells_what_messages_train_on(sft_main: Main) -> None:
    status, out, _ = sft_main("--help")
    assert status == 0
    assert "train on the assistant's turns alone" in " ".join(out.split())


def test_no_arguments_are_read_from_a_file_beside_the_program(
    sft_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HfArgumentParser adds those of <program>.args, if there is such a file."""
    (tmp_path / "sft.args").write_text("--learning_rate=-7", encoding="utf-8")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "sft.py")])
    assert _line(sft_main(seed=-1)).startswith("seed: ")


@pytest.mark.parametrize("full", [False, True])
def test_bf16_that_is_slow_here_is_said_once(
    full: bool, sft_main: Main, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from lora_ops.quant import native_abi
    from lora_ops.runtime import machine

    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: False)
    monkeypatch.setattr(machine, "slow_16bit_reason", lambda *_: "products take 99 times as long here")
    monkeypatch.setattr(machine, "_told", set())
    kind = {"full": True, "quantize": "none"} if full else {}
    assert sft_main(max_steps=1, bf16=True, **kind)[0] == 0
    told = [r.getMessage() for r in caplog.records if "99 times" in r.getMessage()]
    assert len(told) == 1
    if full:
        assert told == ["bf16: products take 99 times as long here; leave it out to train in float32"]
    caplog.clear()
    assert sft_main(max_steps=1, **kind)[0] == 0
    assert "99 times" not in caplog.text


def test_the_documented_call_works_with_messages_and_tools(sft_main: Main, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "chat"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        encoding="utf-8",
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    data = tmp_path / "DATA.JSONL"
    data.write_text("".join(json.dumps({"messages": turns, "tools": []}) + "\n" for _ in range(4)), encoding="utf-8")
    status, out, err = sft_main("--assistant_only_loss", model_name_or_path=model, dataset=data)
    assert status == 0, err
    assert "2 steps, mean loss" in out
