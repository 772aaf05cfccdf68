"""Full fine-tuning of the demo's model with AdamW states that exceed their memory, in 32 and in 8 bits.

python -m examples.demo.full [--max_steps N] [--page_budget 1MiB] [--output_dir DIR] [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.demo import report
from examples.demo.base_model import DEMO_MODEL
from examples.demo.data import instruction_dataset, instruction_items
from lora_ops.trainer._files import write_json
from lora_ops.trainer._require import TRAIN_PACKAGES, require
from lora_ops.trainer.divergence import DivergedError

HELDOUT_ITEMS = 120


def run(output_dir: Path, *, max_steps: int, page_budget: str, seed: int, batch_size: int = 16) -> dict[str, Any]:
    """Train every weight of the demo's model twice, and write curves.png, result.json and the two models.

    Args:
        output_dir: the folder; it is made if it is missing.
        max_steps: optimizer steps. batch_size: questions in each.
        page_budget: most bytes of the optimizer's states in memory.
        seed: seed of the order.

    Returns:
        What result.json holds: for "32" and "8" bits the loss curve, held-out losses and what the pages did.

    Raises:
        ImportError: if a package of the `train` extra is missing.
        ValueError: if page_budget is no size.
    """
    require(*TRAIN_PACKAGES)
    from examples.demo.evaluate import item_losses
    from examples.demo.progress import progress_bar
    from lora_ops.trainer import sft

    data = instruction_dataset("train").select_columns(["prompt", "completion"])
    items = instruction_items("heldout", max_items=HELDOUT_ITEMS)
    result: dict[str, Any] = {"steps": max_steps, "page_budget": page_budget, "seed": seed, "runs": {}}
    for bits in (32, 8):
        args = sft.SFTArguments(
            model_name_or_path=str(DEMO_MODEL),
            dataset="the standard library",
            output_dir=str(output_dir / f"{bits}bit"),
            full=True,
            quantize="none",
            optim=f"paged_adamw_{bits}bit",
            page_budget=page_budget,
            learning_rate=1e-3,
            warmup_steps=10,
            weight_decay=0.01,
            per_device_train_batch_size=batch_size,
            max_steps=max_steps,
            max_length=256,
            logging_steps=1,
            seed=seed,
        )
        model, tokenizer = sft.load_model(args)
        if bits == 32:
            result["heldout_before"] = _mean(item_losses(model, tokenizer, items))
        trained = sft.train(
            args, model=model, tokenizer=tokenizer, train_dataset=data, progress=progress_bar(f"  {bits}-bit states")
        )
        if trained.paging is None:
            raise RuntimeError("the optimizer has no pages")
        result["runs"][str(bits)] = {
            "loss_curve": [entry["loss"] for entry in trained.log_history if "loss" in entry],
            "heldout_after": _mean(item_losses(model, tokenizer, items)),
            "tokens_per_second": trained.tokens_per_second,
            "states": trained.paging.extents * trained.paging.extent_bytes,
            "peak": trained.paging.peak,
            "paging": str(trained.paging),
        }
    write_json(output_dir / "result.json", result)
    curves = {f"{bits}-bit states": run["loss_curve"] for bits, run in result["runs"].items()}
    report.save_curves(output_dir / "curves.png", curves, f"full fine-tuning, {page_budget} of AdamW states in memory")
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train twice, and print what came of it.

    Args:
        argv: command-line arguments; the process's own when None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.full", description="Full fine-tuning with AdamW states that exceed memory."
    )
    parser.add_argument("--max_steps", type=int, default=120, help="optimizer steps (%(default)s)")
    parser.add_argument("--page_budget", default="1MiB", help="bytes of AdamW's states in memory (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("full_output"), help="where files go (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (%(default)s)")
    args = parser.parse_args(argv)
    try:
        result = run(args.output_dir, max_steps=args.max_steps, page_budget=args.page_budget, seed=args.seed)
    except (ImportError, FileNotFoundError, ValueError, DivergedError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"\n  held-out loss before {result['heldout_before']:.3f}")
    for bits, trained in result["runs"].items():
        print(f"  {bits:>2} bits: after {trained['heldout_after']:.3f}, {trained['tokens_per_second']:,.0f} tokens/s")
        print(f"    {trained['paging']}")
    print(f"  {args.output_dir}/: result.json, curves.png, and the models in 32bit/ and 8bit/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
