"""`make sweep`: every family of transformers that can be made tiny, dense and in NF4, against stock PEFT.

Writes docs/sweep.md, and fails if a row differs, ends in an error of ours, or leaves something unserved without a word.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from tests.sweep.compare import Outcome, run
from tests.sweep.families import Family, families

TABLE = Path(__file__).parents[2] / "docs" / "sweep.md"
_HEAD = """# Models

What `lora_ops.inject(model)` makes of every causal, seq2seq, encoder, vision, speech and image-text family of
transformers that builds from a tiny configuration: one forward and backward, float32, on the CPU, against stock PEFT
with the same adapters over the same weights (for NF4 the dequantized ones). Written by `make sweep`, with {versions}.

"equal": output and every gradient are stock PEFT's up to float32 rounding, and what is not served is said. "refused":
an error that was raised before anything was changed.

{counts}

| family | kind | dense | fused | NF4 | fused | what is said |
| --- | --- | --- | --- | --- | --- | --- |
"""
GOOD = ("equal", "refused")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "model_types", nargs="*", help="families to run, as in config.json; all, and the table, by default"
    )
    chosen = parser.parse_args(argv).model_types
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    todo = [f for f in families() if not chosen or f.model_type in chosen]
    if unknown := sorted(set(chosen) - {f.model_type for f in todo}):
        parser.error(f"model_types: {', '.join(unknown)} not in transformers {transformers.__version__}")
    rows = [(family, run(family)) for family in tqdm(todo, desc="families", disable=None)]
    bad = [(f, name, o) for f, outcomes in rows for name, o in outcomes.items() if o.verdict not in (*GOOD, "unbuilt")]
    for family, name, o in bad:
        print(f"{o.verdict}: {family.model_type} ({family.class_name}), {name}: {o.detail}")
    print(_counts(rows))
    if not chosen:
        TABLE.write_text(table(rows))
    return 1 if bad else 0


def table(rows: list[tuple[Family, dict[str, Outcome]]]) -> str:
    """The page: counts, one row a family that builds, and a list of those that do not."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "peft", "torch"))
    lines = [_HEAD.format(versions=versions, counts=_counts(rows))]
    for family, outcomes in rows:
        dense, nf4 = outcomes["dense"], outcomes["nf4"]
        if dense.verdict != "unbuilt":
            cells = [
                family.model_type,
                family.kind,
                dense.verdict,
                _fused(dense),
                nf4.verdict,
                _fused(nf4),
                _said(dense, nf4),
            ]
            lines.append(f"| {' | '.join(cells)} |\n")
    lines.append("\n## Not built\n\nBy transformers alone, from sizes made small by their names.\n\n")
    lines += [f"- {f.model_type}: {_cell(o['dense'].detail)}\n" for f, o in rows if o["dense"].verdict == "unbuilt"]
    return "".join(lines)


def _counts(rows: list[tuple[Family, dict[str, Outcome]]]) -> str:
    built = [outcomes for _, outcomes in rows if outcomes["dense"].verdict != "unbuilt"]
    parts = [f"{len(built)} of {len(rows)} families built"]
    for name in ("dense", "nf4"):
        verdicts = [outcomes[name].verdict for outcomes in built]
        parts.append(f"{name}: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts))))
    return "; ".join(parts) + "."


def _fused(outcome: Outcome) -> str:
    return "" if outcome.verdict == "refused" else "{}/{}".format(*outcome.fused)


def _said(dense: Outcome, nf4: Outcome) -> str:
    texts = [o.detail for o in (dense, nf4) if o.detail] + dense.said + nf4.said
    return _cell("; ".join(dict.fromkeys(texts)))


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 300 else text[:299] + "…"


if __name__ == "__main__":
    sys.exit(main())
