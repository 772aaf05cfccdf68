"""The report: results.json and report.md in one folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.files import write_json, write_text
from bench.measure import Row, Run


def run_from_dict(data: dict[str, Any]) -> Run:
    """A Run from its JSON."""
    return Run(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def write_report(folder: Path, about: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write everything measured so far; called after every section, so that no crash loses what came before."""
    write_json(folder / "results.json", {"about": about, "runs": [asdict(run) for run in runs]})
    write_text(folder / "report.md", markdown(about, runs))


def markdown(about: dict[str, Any], runs: Sequence[Run]) -> str:
    """The report's text."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"# Benchmarks on {about.get('gpu') or about['cpu']}", ""]
    facts = {
        "Date": about["date"],
        "Command": f"`{about['command']}`",
        "Commit": about["commit"] + (" (with uncommitted changes)" if about["commit"].endswith("+") else ""),
        "CPU": f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['cpu_capability']}",
        "Load at start": about["load_at_start"],
        "Native kernels": about["native"],
    }
    if "gpu" in about:
        facts |= {
            "GPU": f"{about['gpu']}, sm_{about['gpu_capability'].replace('.', '')}, {about['gpu_memory_gib']} GiB",
            "Driver": f"{about['driver']}, CUDA {about['cuda']}",
        }
    facts["Versions"] = versions
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "Each contender was first checked against float64 by the rule of tests/tolerance.py; a wrong one gets no time.",
        "The contenders of a comparison ran in turn in one process; times are medians. GB/s and GFLOP/s count the",
        "bytes and operations that the work needs at least; *of limit* is the time that these take at the ceilings",
        "below, over the time measured. The copy ceiling is that of memory: work that fits the cache may exceed it.",
        "`python -m bench.charts FOLDER` draws the results of the folder.",
    ]
    for run in runs:
        lines += ["", f"## {run.name}", ""]
        lines += run.notes
        if run.ceilings:
            c = run.ceilings
            lines.append(
                f"- ceilings: copy {c['copy_bytes_per_s'] / 1e9:.1f} GB/s (read + written), GEMM "
                f"{c['flops_per_s'] / 1e9:,.0f} GFLOP/s in the activations' dtype, "
                f"{c['fp32_flops_per_s'] / 1e9:,.0f} in float32."
            )
        lines += _failures(run)
        lines += _aims(run)
        lines += _checks(run)
        for op, rows in itertools.groupby(run.rows, key=lambda row: row.op):
            table = _steps if op == "end_to_end" else _table
            lines += ["", f"### {op}", "", *table(list(rows))]
        lines += _excluded(run)
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    sums = any(r.over_sum is not None for r in rows)
    lines = [
        f"| N × K | variant | M | contender | ms | p10–p90 | ratio |{' over sum |' * sums} GB/s | GFLOP/s | of limit |",
        f"|---|---|---|---|---|---|---|{'---|' * sums}---|---|---|",
    ]
    for r in rows:
        name = f"**{r.contender}**" if r.ours else r.contender
        name += f" ({r.note})" if r.note else ""
        head = f"| {r.n} × {r.k} | {r.variant} | {r.m or ''} | {name} "
        if r.median_ms is None:
            lines.append(f"{head}| {r.status.upper()} | | |{' |' * sums} | | |")
            continue
        ratio = f"{r.over_baseline:.2f}" if r.over_baseline is not None else ""
        if sums:
            ratio += f" | {r.over_sum:.2f}" if r.over_sum is not None else " | "
        flops = f"{r.gflops:,.0f}" if r.gflops else ""
        lines.append(
            f"{head}| {_ms(r.median_ms)} | {_ms(r.p10_ms or 0)}–{_ms(r.p90_ms or 0)} | {ratio} "
            f"| {r.gbps or 0:,.1f} | {flops} | {r.percent_of_limit or 0:.0f} % |"
        )
    baselines = sorted({r.baseline for r in rows})
    return [*lines, "", f"Ratio: time over that of {', '.join(baselines)}.", *(_OVER_SUM if sums else [])]


# Why no ratio of 1.1 can be asked for there.
_OVER_SUM = [
    "Over sum: time over both together, each measured apart. Each keeps every core busy, the transfers too, which are",
    "copies from and to the page cache. So a step of both takes at least the core seconds of both over the number of",
    "cores, which is the sum of their times and not the longer of the two, but for what it saves by updating an extent",
    "while it is in the cache.",
]


def _steps(rows: list[Row]) -> list[str]:
    """Whole training steps: tokens a second and memory."""
    lines = [
        "| variant | tokens | contender | tokens/s | ms | p10–p90 | ratio | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"**{r.contender}**" if r.ours else r.contender
        name += f" ({r.note})" if r.note else ""
        if r.median_ms is None:
            lines.append(f"| {r.variant} | {r.m} | {name} | {r.status.upper()} | | | | |")
            continue
        ratio = f"{r.over_baseline:.2f}" if r.over_baseline is not None else ""
        peak = f"{r.peak_gib:.1f}" if r.peak_gib is not None else ""
        lines.append(
            f"| {r.variant} | {r.m} | {name} | {r.m / r.median_ms * 1e3:,.0f} | {_ms(r.median_ms)} "
            f"| {_ms(r.p10_ms or 0)}–{_ms(r.p90_ms or 0)} | {ratio} | {peak} |"
        )
    return [*lines, "", f"Ratio: time over that of {', '.join(sorted({r.baseline for r in rows}))}."]


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _failures(run: Run) -> list[str]:
    lines: list[str] = []
    for failure in run.failures:
        lines += ["", f"**FAILED: {failure['section']}**", "", "```", failure["reason"].strip(), "```"]
    return lines


def _aims(run: Run) -> list[str]:
    if not run.aims:
        return []
    lines = ["", "### Aims", "", "| aim | limit | worst | of rows | verdict | where |", "|---|---|---|---|---|---|"]
    for aim in run.aims:
        worst = "" if aim["worst"] is None else f"{aim['worst']:.3g}"
        verdict = f"**{aim['verdict']}**" if aim["verdict"] == "missed" else aim["verdict"]
        lines.append(f"| {aim['aim']} | {aim['limit']} | {worst} | {aim['rows']} | {verdict} | {aim['where']} |")
    return lines


def _checks(run: Run) -> list[str]:
    if not run.checks:
        return []
    lines = [
        "",
        "### Checks",
        "",
        "Against float64; *captured*: replays of a CUDA graph on changed operands, bitwise against eager calls.",
        "",
        "| op | backend | right | wrong | declined |",
        "|---|---|---|---|---|",
    ]
    tally: dict[tuple[str, str], dict[str, int]] = {}
    for check in run.checks:
        op = f"{check['op']}, captured" if check["captured"] else check["op"]
        counts = tally.setdefault((op, check["backend"]), {"ok": 0, "wrong": 0, "declined": 0})
        counts[check["status"]] += 1
    lines += [f"| {op} | {b} | {n['ok']} | {n['wrong']} | {n['declined']} |" for (op, b), n in tally.items()]
    reasons = [c for c in run.checks if c["status"] != "ok"]
    return lines + [""] + [f"- {c['status']}: {c['op']} on {c['backend']}, {c['case']}: {c['reason']}" for c in reasons]


def _excluded(run: Run) -> list[str]:
    rows = [r for r in run.rows if r.status != "ok"]
    if not rows:
        return []
    lines = ["", "### Not timed", ""]
    reasons: dict[tuple[str, str, str, str], list[Row]] = {}
    for r in rows:
        reasons.setdefault((r.contender, r.status, r.op, r.reason), []).append(r)
    for (contender, status, op, reason), group in reasons.items():
        where = ", ".join(sorted({" ".join(p for p in (r.variant, f"M={r.m}" if r.m else "") if p) for r in group}))
        lines.append(f"- {contender}, {op}{f' ({where})' if where else ''}: {status}: {reason}")
    return lines
