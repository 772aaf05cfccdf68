"""The demo: QLoRA fine-tuning of a small Llama model with `lora_ops.inject` and TRL, start to end in minutes on a CPU.

python -m examples.demo [--max_steps N] [--output_dir DIR] [--seed N]
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo import report
from examples.demo.base_model import DEMO_MODEL
from examples.demo.data import instruction_dataset, instruction_items
from examples.demo.stdlib import library_files
from lora_ops.trainer._files import write_json
from lora_ops.trainer._require import TRAIN_PACKAGES, require
from lora_ops.trainer.divergence import DivergedError

HELDOUT_ITEMS = 240

_INTRO = """\
lora_ops demo: QLoRA on a small Llama model

  The base model was trained from nothing on plain source text of Python's standard library. It has never seen a
  question. Now its weights are frozen and stored in 4 bits (NF4), low-rank adapters are injected into every linear
  layer by lora_ops.inject(), and TRL's SFTTrainer trains them on questions about modules the base model never saw.
  Whether that helped is measured on a third set of modules, which neither training ever saw.
"""


def _quiet() -> None:
    """Keep libraries' notes off the screen that do not concern this run; our own and errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "bitsandbytes", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|torch|accelerate)\b")
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def _unquantized_loss(items: list[dict[str, str]]) -> tuple[float, int]:
    """Held-out loss of the base model in float32 without adapters, and its weights' bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.demo.evaluate import item_losses

    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, trust_remote_code=False)
    losses = item_losses(model, tokenizer, items, progress="  unquantized base")
    return sum(losses) / len(losses), model.get_memory_footprint()


def _samples(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first held-out item of two kinds, whatever they are: not chosen by their answers."""
    return [next(item for item in items if item["kind"] == kind) for kind in ("describe", "signature")]


def _answer(model: Any, tokenizer: Any, items: list[dict[str, str]]) -> list[str]:
    from examples.demo.evaluate import greedy_answer

    return [greedy_answer(model, tokenizer, item["prompt"]) for item in items]


def _show(items: list[dict[str, str]], before: list[str], after: list[str] | None = None) -> None:
    for index, item in enumerate(items):
        print("\n    " + item["prompt"].removesuffix("\nAnswer:\n").replace("\n", "\n    "))
        print(f"      before: {before[index]!r}")
        if after is not None:
            print(f"      after:  {after[index]!r}")
            print(f"      source: {item['completion']!r}")


def run(output_dir: Path, *, max_steps: int, seed: int) -> dict[str, Any]:
    """Run the demo and write loss_curve.png, result.json and adapter/ into a folder.

    Args:
        output_dir: the folder; it is made if it is missing.
        max_steps: optimizer steps.
        seed: seed of adapters, order and dropout.

    Returns:
        What result.json holds.

    Raises:
        ImportError: if a package of the `train` extra is missing.
        FileNotFoundError: if this Python ships without its library's sources.
    """
    require(*TRAIN_PACKAGES)
    started = time.perf_counter()
    print(_INTRO, flush=True)
    _quiet()
    import lora_ops
    from examples.demo.evaluate import item_losses
    from examples.demo.progress import progress_bar
    from lora_ops.trainer import sft

    _say(1, "Building questions from the running Python's standard library (parsed, never imported)")
    train_data = instruction_dataset("train").select_columns(["prompt", "completion"])
    items = instruction_items("heldout", max_items=HELDOUT_ITEMS)
    modules = len({item["module"] for item in items})
    print(f"  {len(train_data):,} questions to train on; {len(items)} held out, from {modules} other modules")
    print(f"  the base model saw {len(library_files(split='base'))} files of still other modules")

    args = _arguments(output_dir, max_steps, seed)
    _say(2, "Loading the base model; lora_ops.inject(model, quantize='nf4', target_modules='all-linear')")
    unquantized, weights_fp32 = _unquantized_loss(items)
    model, tokenizer = sft.load_model(args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = list(lora_ops.injection_report(model))
    fused = sum(layer.fused for layer in layers)
    print(f"  {fused} of {len(layers)} linear layers fused, {trained:,} trained parameters")
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    quantized = model.get_memory_footprint() - adapters

    _say(3, "Before: loss on held-out answers, and two raw answers")
    samples = _samples(items)
    before = item_losses(model, tokenizer, items, progress="  held-out loss")
    first_answers = _answer(model, tokenizer, samples)
    _show(samples, first_answers)

    _say(4, f"Training the adapters: {max_steps} steps of {args.per_device_train_batch_size} questions")
    with lora_ops.trace() as trace:
        trained_run = sft.train(
            args, model=model, tokenizer=tokenizer, train_dataset=train_data, progress=progress_bar("  training")
        )

    _say(5, "After: the same questions again")
    after = item_losses(model, tokenizer, items, progress="  held-out loss")
    last_answers = _answer(model, tokenizer, samples)
    _show(samples, first_answers, last_answers)

    losses = report.compare(items, before, after)
    adapter_file = output_dir / "adapter" / "adapter_model.safetensors"
    result = {
        "heldout": {"losses": losses, "unquantized_base": unquantized, "items": _rows(items, before, after)},
        "answers": _answers(samples, first_answers, last_answers),
        "training": _training(trained_run, len(train_data), seed),
        "adapter": {"bytes": adapter_file.stat().st_size, "parameters": trained},
        "memory": {
            "weights_fp32": weights_fp32,
            "weights_quantized": quantized,
            "peak": report.peak_memory_bytes(),
        },
        "layers": [
            {"name": layer.name, "fused": layer.fused, "backend": layer.backend, "reason": layer.reason}
            for layer in layers
        ],
        "trace": trace.summary(),
        "versions": report.versions(),
        "seconds": time.perf_counter() - started,
    }
    write_json(output_dir / "result.json", result)
    _tell(output_dir, result, trained_run.log_history, modules)
    return result


def _arguments(output_dir: Path, max_steps: int, seed: int) -> Any:
    from lora_ops.trainer import sft

    return sft.SFTArguments(
        model_name_or_path=str(DEMO_MODEL),
        dataset="the standard library",
        output_dir=str(output_dir / "adapter"),
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        quantize="nf4",
        learning_rate=4e-3,
        warmup_steps=10,
        per_device_train_batch_size=16,
        max_steps=max_steps,
        max_length=256,
        logging_steps=5,
        seed=seed,
    )


def _rows(items: Sequence[dict[str, Any]], before: Sequence[float], after: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"file": item["file"], "kind": item["kind"], "before": b, "after": a}
        for item, b, a in zip(items, before, after, strict=True)
    ]


def _answers(samples: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": item["prompt"], "source": item["completion"], "before": b, "after": a}
        for item, b, a in zip(samples, before, after, strict=True)
    ]


def _training(run: Any, questions: int, seed: int) -> dict[str, Any]:
    return {
        "steps": run.global_step,
        "seed": seed,
        "questions": questions,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "loss_curve": [{"step": e["step"], "loss": e["loss"]} for e in run.log_history if "loss" in e],
    }


def _tell(output_dir: Path, result: dict[str, Any], log_history: list[dict[str, Any]], modules: int) -> None:
    """Draw the curve, and print the tables and where everything is."""
    losses = result["heldout"]["losses"]
    drawn = report.save_curve(
        output_dir / "loss_curve.png", log_history, losses["all"]["before"], losses["all"]["after"]
    )
    print("\n" + report.loss_table(losses))
    print(f"  nats per answer token; interval of the paired differences, clustered by module ({modules})")
    print("  part of the gain is an answer's form, which the base model had never seen: see the raw answers above\n")
    print(report.figures_table(result))
    print(f"\n  {output_dir}/: adapter/ (PEFT format), result.json" + (", loss_curve.png" if drawn else ""))
    if not drawn:
        print("  no loss_curve.png: matplotlib is not installed")
    print(f"  {result['seconds']:.0f} s in all")


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run the demo.

    Args:
        argv: command-line arguments; the process's own when None.

    Returns:
        0 if the held-out loss fell and its 95 % interval excludes zero, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="QLoRA fine-tuning, start to end, on any machine."
    )
    parser.add_argument("--max_steps", type=int, default=160, help="optimizer steps (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="where files go (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters, order and dropout (%(default)s)")
    args = parser.parse_args(argv)
    if args.max_steps < 1:
        parser.error(f"--max_steps: expected at least 1, got {args.max_steps}")
    try:
        result = run(args.output_dir, max_steps=args.max_steps, seed=args.seed)
    except (ImportError, FileNotFoundError, DivergedError) as error:
        parser.exit(2, f"error: {error}\n")
    if result["heldout"]["losses"]["all"]["interval"]["high"] < 0:
        return 0
    print("\nThe held-out loss did not clearly fall: the 95 % interval does not lie below zero.")
    return 1
