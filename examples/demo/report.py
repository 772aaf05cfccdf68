"""What the demo shows at its end: the table, the loss curve, and the numbers behind them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.demo.stats import PairedInterval, paired_interval
from lora_ops.trainer._files import replacing_file


def compare(
    items: Sequence[dict[str, str]], before: Sequence[float], after: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Compare held-out losses before and after, for all items and for each kind.

    Args:
        items: the items, with the entries kind and module.
        before: each item's loss before.
        after: each item's loss after.

    Returns:
        For "all" and each kind: before, after, and the paired interval clustered by module.
    """
    result = {}
    for kind in ["all", *sorted({item["kind"] for item in items})]:
        chosen = [i for i, item in enumerate(items) if kind in ("all", item["kind"])]
        if len({items[i]["module"] for i in chosen}) < 2:
            continue  # no error bar from a single module
        first, last = [before[i] for i in chosen], [after[i] for i in chosen]
        interval = paired_interval(first, last, groups=[items[i]["module"] for i in chosen])
        result[kind] = {
            "before": sum(first) / len(first),
            "after": sum(last) / len(last),
            "interval": asdict(interval),
            "excludes_zero": interval.excludes_zero,
        }
    return result


def peak_memory_bytes() -> int | None:
    """Tell this process's greatest memory use so far.

    Returns:
        Bytes of resident memory, or None where the system does not tell (Windows).
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Collect the versions of what ran.

    Returns:
        Package names and versions, Python's and the processor's kind.
    """
    import lora_ops

    found = {"python": platform.python_version(), "machine": platform.machine(), "lora_ops": lora_ops.__version__}
    return found | {name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets")}


def save_curve(path: Path, history: Iterable[dict[str, Any]], before: float, after: float) -> bool:
    """Draw the training loss, and the held-out loss before and after, as a PNG.

    Args:
        path: the file to write.
        history: the Trainer's log history.
        before: mean held-out loss before training.
        after: mean held-out loss after training.

    Returns:
        False if matplotlib is not installed, so that nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    if points:
        axes.plot(*zip(*points, strict=True), color="#4472c4", linewidth=1.5, label="training loss")
        axes.plot([0, points[-1][0]], [before, after], "o", color="#c0504d", label="held-out loss, before and after")
    axes.set(xlabel="optimizer step", ylabel="nats per answer token", title="QLoRA with lora_ops.inject")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing_file(path) as temporary:
        figure.savefig(temporary)
    return True


def save_curves(path: Path, curves: dict[str, Sequence[float]], title: str) -> bool:
    """Draw the training losses of several runs, smoothed over ten steps, as a PNG.

    Args:
        path: the file to write.
        curves: the loss of each step, by the run's name.
        title: the picture's.

    Returns:
        False if matplotlib is not installed, so that nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        recent = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), [sum(r) / len(r) for r in recent], linewidth=1.5, label=name)
    axes.set(xlabel="optimizer step", ylabel="nats per answer token, mean of ten steps", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing_file(path) as temporary:
        figure.savefig(temporary)
    return True


def _size(count: float | None) -> str:
    if count is None:
        return "not told by this system"
    return f"{count / 2**20:,.1f} MiB"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Line up rows: the first column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def loss_table(losses: dict[str, dict[str, Any]]) -> str:
    """Lay out what `compare` found.

    Args:
        losses: its result.

    Returns:
        A text table.
    """
    rows = [["held-out loss", "before", "after", "difference", "95 % interval", "items"]]
    for kind, entry in losses.items():
        interval = PairedInterval(**entry["interval"])
        rows.append(
            [
                "all items" if kind == "all" else f"  {kind}",
                f"{entry['before']:.3f}",
                f"{entry['after']:.3f}",
                f"{interval.mean:+.3f}",
                f"[{interval.low:+.3f}, {interval.high:+.3f}]",
                str(interval.items),
            ]
        )
    head, *body = _columns(rows)
    return "\n".join([head, "  " + "─" * (len(head) - 2), *body])


def figures_table(result: dict[str, Any]) -> str:
    """Lay out the run's other figures.

    Args:
        result: the demo's result, as written to result.json.

    Returns:
        A text table.
    """
    training, memory, adapter = result["training"], result["memory"], result["adapter"]
    speed = f"{training['tokens_per_second']:,.0f} tokens/s ({training['tokens']:,} in {training['seconds']:.0f} s)"
    rows = [
        ("base model, not quantized", f"held-out loss {result['heldout']['unquantized_base']:.3f}"),
        ("training speed", speed),
        ("frozen weights", f"{_size(memory['weights_fp32'])} in float32 → {_size(memory['weights_quantized'])} in NF4"),
        ("adapter", f"{_size(adapter['bytes'])}, {adapter['parameters']:,} trained parameters"),
        ("peak memory, this process", _size(memory["peak"])),
    ]
    for index, (name, count) in enumerate(_by_backend(result["trace"]).items()):
        rows.append(("backends that ran" if index == 0 else "", f"{name}: {count:,} calls"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


def _by_backend(trace: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in trace:
        name = f"{row['op']} on {row['backend']} ({row['device']}, {row['dtype']})"
        counts[name] = counts.get(name, 0) + row["count"]
    return counts or {"none: no lora_ops op was called": 0}
