"""PNG charts of a report: `python -m bench.charts bench/results/cpu/<cpu>` draws them into build/charts/<cpu>."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.files import write_with
from bench.measure import Row, Run
from bench.report import run_from_dict

COLOURS = {
    "dense": "#444444",
    "frozen dense": "#444444",
    "copy of the dense weight": "#444444",
    "lora_ops": "#c1121f",
    "lora_ops triton": "#c1121f",
    "lora_ops cuda": "#8f2d56",
    "lora_ops reference": "#e9967a",
    "bitsandbytes": "#1d6fb8",
    "bitsandbytes eval": "#7fb3dd",
    "torchao": "#6f4fa0",
    "PEFT": "#2a9d5c",
    "PEFT + bitsandbytes": "#1d6fb8",
    "eager PEFT formula": "#8fce9f",
    "addmm by hand": "#c79a2b",
    "Unsloth's way": "#8a6d1d",
    "torch.compile": "#e07a30",
    "lora_ops K-step": "#8f2d56",
    "lora_ops β=1": "#e9967a",
}


def write_charts(folder: Path, about: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    """Write a chart of each op that has times: curves over M where M varies, bars otherwise. Answers the file names."""
    machine = about.get("gpu") or about["cpu"]
    names = []
    ops = dict.fromkeys(row.op for run in runs for row in run.rows if row.median_ms is not None)
    for op in ops:
        panels = _panels(op, runs)
        sweep = any(len({row.m for row in rows}) > 2 for rows in panels.values())
        if sweep:
            draw, quantities = _curves, {"time": "median_ms", "ratio": "over_baseline"}
        else:
            draw, quantities = _bars, {"time": "median_ms"}
            if any(row.op == "lora_linear" for rows in panels.values() for row in rows):
                quantities = {"ratio": "over_baseline"}
        for label, attribute in quantities.items():
            name = f"{op}_{label}.png"
            draw(folder / name, f"{op} on {machine}", label, attribute, panels)
            names.append(name)
    return names


def _panels(op: str, runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Rows of one op with a time, by the title of their panel: one for each run and shape."""
    panels: dict[str, list[Row]] = {}
    for run in runs:
        for row in run.rows:
            if row.op == op and row.median_ms is not None:
                panels.setdefault(f"{row.n} × {row.k}, {run.name}", []).append(row)
    return panels


def _figure(n: int, width: float, height: float, *, sharey: bool) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n, height), layout="constrained")
    return figure, figure.subplots(1, n, sharey=sharey, squeeze=False)[0]


def _axis_label(label: str, panels: dict[str, list[Row]]) -> str:
    baseline = next(row.baseline for rows in panels.values() for row in rows)
    return "time [ms]" if label == "time" else f"time over {baseline}"


def _curves(path: Path, title: str, label: str, attribute: str, panels: dict[str, list[Row]]) -> None:
    figure, axes = _figure(len(panels), 5.6, 4.6, sharey=True)
    for axis, (panel, rows) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(row.contender for row in rows):
            points = [(r.m, getattr(r, attribute)) for r in rows if r.contender == name]
            points = [(m, value) for m, value in points if value is not None]
            ours = name.startswith("lora_ops")
            axis.plot(
                [m for m, _ in points], [v for _, v in points], marker="o", markersize=4 + 1.5 * ours,
                linewidth=1.4 + ours, color=COLOURS.get(name), label=name, zorder=3 if ours else 2,
            )  # fmt: skip
        tokens = sorted({row.m for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(f"{value:e}")[0] in "25" else "")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.set_xlabel("M [tokens]")
        axis.set_title(panel, fontsize=10)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel(_axis_label(label, panels))
    axes[0].legend(fontsize=9)
    figure.suptitle(title)
    write_with(path, lambda beside: figure.savefig(beside, dpi=140))


def _bars(path: Path, title: str, label: str, attribute: str, panels: dict[str, list[Row]]) -> None:
    bars = {panel: [(r, getattr(r, attribute)) for r in rows] for panel, rows in panels.items()}
    # In a chart of ratios the baseline is the line at 1.
    drop_baseline = attribute == "over_baseline"
    bars = {
        panel: [(r, v) for r, v in rows if v is not None and not (drop_baseline and r.contender == r.baseline)]
        for panel, rows in bars.items()
    }
    if not any(bars.values()):
        return
    longest = max(len(rows) for rows in bars.values())
    figure, axes = _figure(len(panels), 6.4, 1.4 + 0.27 * longest, sharey=False)
    for axis, (panel, rows) in zip(axes, bars.items(), strict=True):
        y, ticks, position = [], [], 0.0
        previous = None
        for row, _ in rows:
            group = (row.variant, row.m)
            position += 0.6 * (previous is not None and group != previous)
            previous = group
            y.append(position)
            ticks.append(", ".join(p for p in (row.contender, row.variant, f"M={row.m}" if row.m else "") if p))
            position += 1
        axis.barh(y, [v for _, v in rows], color=[COLOURS.get(r.contender, "#999999") for r, _ in rows])
        for at, (_, value) in zip(y, rows, strict=True):
            axis.annotate(
                f"{value:.3g}", (value, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(y, ticks, fontsize=8)
        axis.invert_yaxis()
        if label == "time":
            axis.set_xscale("log")
        else:
            axis.axvline(1.0, color="#444444", linewidth=1)
        axis.margins(x=0.18, y=0.02)
        axis.set_xlabel(_axis_label(label, panels))
        axis.set_title(panel, fontsize=10)
        axis.grid(True, axis="x", alpha=0.25)
    figure.suptitle(title)
    write_with(path, lambda beside: figure.savefig(beside, dpi=140))


def main(argv: list[str] | None = None) -> int:
    """Draw the results of a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.charts", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the results.json of a run of the benchmarks")
    folder = parser.parse_args(argv).folder
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    output = ROOT / "build" / "charts" / folder.resolve().name
    for name in write_charts(output, results["about"], [run_from_dict(run) for run in results["runs"]]):
        print(f"wrote {output / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
