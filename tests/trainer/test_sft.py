"""Supervised fine-tuning end to end on a tiny model: files in, stock PEFT adapter out, resume, clear errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch

from examples.demo.evaluate import greedy_answer, item_losses
from lora_ops.trainer import _require, sft
from lora_ops.trainer.arguments import SFTArguments


def _arguments(model: Path, dataset: Path, output: Path, **changes) -> SFTArguments:
    settings = {
        "model_name_or_path": str(model), "dataset": str(dataset), "output_dir": str(output), "lora_r": 4,
        "lora_alpha": 8, "per_device_train_batch_size": 4, "max_steps": 12, "max_length": 128, "learning_rate": 1e-2,
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return SFTArguments(**(settings | changes))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_training_lowers_the_loss_and_saves_a_stock_peft_adapter(tiny_model, questions, tmp_path, quantize):
    result = sft.train(_arguments(tiny_model, questions, tmp_path / "out", quantize=quantize))
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert result.global_step == 12
    assert losses[-1] < losses[0] - 0.1
    assert result.tokens > 12 * 4 * 10
    assert result.tokens_per_second > 0

    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert not [name for name in saved if name.endswith((".bin", ".pt", ".pth", ".pkl")) or name.startswith(".")]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    items = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()[:12]]
    ours, theirs = (item_losses(model, tokenizer, items) for model in (result.model, stock))
    # Without quantization the two compute the same; with it the base's weights differ by NF4's rounding.
    assert ours == pytest.approx(theirs, abs=1e-3 if quantize == "none" else 0.3)


def test_same_seed_same_adapter(tiny_model, questions, tmp_path):
    from safetensors.torch import load_file

    states = []
    for run in ("one", "two"):
        sft.train(_arguments(tiny_model, questions, tmp_path / run, max_steps=3, lora_dropout=0.1, seed=7))
        states.append(load_file(tmp_path / run / "adapter_model.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resume_ends_where_an_unbroken_run_ends(tiny_model, questions, tmp_path):
    from safetensors.torch import load_file

    whole = _arguments(tiny_model, questions, tmp_path / "out", max_steps=6, save_steps=3)
    sft.train(whole)
    unbroken = load_file(tmp_path / "out" / "adapter_model.safetensors")
    resumed = _arguments(
        tiny_model, questions, tmp_path / "again", max_steps=6,
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"),
    )  # fmt: skip
    result = sft.train(resumed)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert result.global_step == 6
    for name, value in unbroken.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_loss(tiny_model, questions, tmp_path):
    runs = [
        sft.train(_arguments(tiny_model, questions, tmp_path / str(on), max_steps=3, gradient_checkpointing=on))
        for on in (False, True)
    ]
    curves = [[entry["loss"] for entry in run.log_history if "loss" in entry] for run in runs]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_command_line(tiny_model, questions, tmp_path, capsys):
    status = sft.main(
        ["--model_name_or_path", str(tiny_model), "--dataset", str(questions), "--output_dir", str(tmp_path / "out"),
         "--max_steps", "2", "--lora_r", "2", "--target_modules", "q_proj,v_proj", "--quantize", "none",
         "--per_device_train_batch_size", "2", "--use_cpu", "--disable_tqdm"]
    )  # fmt: skip
    assert status == 0
    assert "2 steps" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 2
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}


def test_command_line_says_what_is_wrong_and_exits_nonzero(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--model_name_or_path", "./nowhere", "--dataset", "x.jsonl", "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "model_name_or_path: there is no folder ./nowhere" in capsys.readouterr().err


def test_full_training_in_pages_resumes_bit_identically(tiny_model, questions, tmp_path):
    """TRL with accumulation, clipping, schedule and weight decay: unpaged = paged = paged and resumed from step 3."""
    from safetensors.torch import load_file

    common = {"full": True, "quantize": "none", "max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 3,
              "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 2, "learning_rate": 3e-3}  # fmt: skip
    pages = {"optim": "paged_adamw_32bit", "page_budget": "128KiB", "page_dir": str(tmp_path / "pages")}
    runs = {
        "unpaged": {"optim": "adamw_torch", "page_budget": "64MiB"},  # ours, with everything in memory
        "paged": pages,
        "resumed": pages | {"resume_from_checkpoint": str(tmp_path / "paged" / "checkpoint-3")},
    }
    models = {}
    for name, changes in runs.items():
        result = sft.train(_arguments(tiny_model, questions, tmp_path / name, **common, **changes))
        models[name] = load_file(tmp_path / name / "model.safetensors")
        assert result.global_step == 6
        assert result.paging.peak <= result.paging.budget
        assert (result.paging.misses > 30) == (name != "unpaged")
    for name, weight in models["unpaged"].items():
        assert torch.equal(models["paged"][name], weight), name
        assert torch.equal(models["resumed"][name], weight), name
    assert not any((tmp_path / "pages").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tmp_path / "paged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "paged").state_dict()
    assert torch.equal(loaded["model.norm.weight"], models["paged"]["model.norm.weight"])


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_names_of_bitsandbytes_are_ours(tiny_model, questions, tmp_path, optim, monkeypatch):
    """Adapters with 8-bit states; a run whose optimizer is not ours would need bitsandbytes, or a GPU."""
    from lora_ops.optim import AdamW

    made = []
    begin = AdamW.__init__
    monkeypatch.setattr(AdamW, "__init__", lambda self, *a, **k: (made.append(k), begin(self, *a, **k))[1])
    result = sft.train(_arguments(tiny_model, questions, tmp_path / "out", optim=optim, lora_r=64))
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert [k["state_bits"] for k in made] == [8]
    assert (result.paging is not None) == optim.startswith("paged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full": True}, "full: expected with quantize 'none', got 'nf4'"),
        ({"page_dir": "x"}, "page_dir: expected together with page_budget or a paged optim"),
        ({"host_budget": "8GiB"}, "host_budget: expected together with page_budget or a paged optim"),
        ({"quantize": "int3"}, "quantize: expected 'nf4' or 'none', got 'int3'"),
        ({"quantize": "none", "skip_modules": "down_proj"}, "skip_modules: expected with quantize 'nf4', got 'none'"),
        ({"lora_r": 0}, "lora_r: expected at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a number in \[0, 1\), got 1.0"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive number"),
        ({"max_steps": 0}, "max_steps: expected a positive number or -1"),
        ({"save_steps": -1}, "save_steps: expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, questions, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        _arguments(tiny_model, questions, tmp_path, **change)


def test_datasets_in_other_formats(tmp_path):
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]), encoding="utf-8")
    assert sft.load_dataset(str(alpaca))[0] == {"prompt": "Add.\n1 2\n", "completion": "3"}
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"a": 1, "b": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset: expected the columns .* got a, b"):
        sft.load_dataset(str(odd))
    with pytest.raises(ValueError, match=r"dataset: there is no file"):
        sft.load_dataset(str(tmp_path / "missing.jsonl"))
    (tmp_path / "data.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset: expected a file ending in .* got data.txt"):
        sft.load_dataset(str(tmp_path / "data.txt"))


def test_missing_packages_name_the_extra():
    with pytest.raises(ImportError, match=r'needs no_such_package: .* pip install "lora_ops\[train\]"'):
        _require.require("json", "no_such_package")


def test_item_losses_are_the_completions_own(tiny_model):
    """Batched and padded, they equal the model's own loss on each item alone with the prompt masked out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    items = [{"prompt": "Question: " + "a " * n + "\nAnswer:\n", "completion": "b" * (n + 1)} for n in range(7)]
    for item, loss in zip(items, item_losses(model, tokenizer, items, batch_size=3), strict=True):
        prompt = tokenizer(item["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(item["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            assert loss == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), abs=1e-4)
    assert greedy_answer(model, tokenizer, "Question", max_new_tokens=4) == greedy_answer(
        model, tokenizer, "Question", max_new_tokens=4
    )
    with pytest.raises(ValueError, match="item 3 fills max_length"):
        item_losses(model, tokenizer, [*items[:3], {"prompt": "a " * 99, "completion": "b"}], max_length=64)
