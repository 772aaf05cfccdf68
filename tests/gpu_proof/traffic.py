"""What lora_linear moves and saves, counted: bytes of each kernel in the interpreter, passes against the peers'.

    TRITON_INTERPRET=1 python -m tests.gpu_proof.traffic     # writes build/traffic.md, in ten minutes

A pass reads or writes one activation [M, K] once. The peers' are counted on the CPU, operator by operator as eager
torch runs them: what each reads and writes of an activation's size, less what the frozen layer itself needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.by_hand import lora_as_unsloth, lora_by_addmm
from bench.measure import Unavailable
from bench.peers import eager_lora, peft_layer
from lora_ops.functional import lora_linear
from lora_ops.kernels.lora_linear.triton_skinny import (
    TARGET_PROGRAMS,
    Dropout,
    reads_once,
    reduce_both,
    reduce_columns,
    reduce_rows,
)
from tests.cases import LinearCase
from tests.gpu_proof.interpreter import KernelTraffic, count_traffic, install

TABLE = Path(__file__).parents[2] / "build" / "traffic.md"
M, WIDTH = 8192, 4096


class PassCounter(TorchDispatchMode):
    """Bytes that operators read and write in tensors of an activation's size; views and allocations are free."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes, self.operators = numel, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info]
        allocates = func._schema.name in ("aten::empty_like", "aten::empty", "aten::new_empty", "aten::detach")
        if allocates or any(not a.is_write for a in aliases):
            return out
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.numel() == self.numel]
        self.bytes += sum(t.numel() * t.element_size() for t in moved)
        self.operators += 1
        return out


def eager_passes(run: Callable[[], object], numel: int, element_size: int = 2) -> float:
    """Passes of a forward and backward beside the frozen layer's own four (x, y, dY, dX once each)."""
    with PassCounter(numel) as counter:
        run()
    return counter.bytes / (numel * element_size) - 4


def saved(run: Callable[[], object], constant: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for its backward beside the constant tensors (weights), each storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    for t in constant:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def layers(
    dropout_p: float, adapter: torch.dtype, width: int
) -> Iterator[tuple[str, Callable[[], object], list[Tensor]]]:
    """(name, forward and backward, weights) of ours and of each peer that has such a layer; ours is the first."""
    case = LinearCase(
        m=width, n=width, k=width, r=16, dtype=torch.bfloat16, weight="dense", adapter_dtype=adapter,
        dropout_p=dropout_p,
    )  # fmt: skip
    i = case.inputs()
    assert isinstance(i.weight, Tensor)
    a, b = i.adapter()
    weights = [i.weight, a, b]

    def functional(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        operands = [t.detach().requires_grad_() for t in (i.x, a, b)]
        return lambda: torch.autograd.grad(forward(*operands), operands, i.dy)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, i.weight, a, b, scale=2.0, dropout_p=dropout_p)

    def peft() -> Callable[[], object]:
        layer = peft_layer(i)
        pair = [getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B")]
        weights.extend(pair)
        operands = [i.x.detach().requires_grad_(), *pair]
        return lambda: torch.autograd.grad(layer(operands[0]), operands, i.dy)

    dropout = torch.nn.Dropout(dropout_p) if dropout_p else torch.nn.Identity()
    for name, make in (
        ("lora_ops", lambda: functional(ours)),
        ("PEFT", peft),
        ("PEFT's formula, eager", lambda: functional(eager_lora(i, dropout))),
        ("addmm by hand, Unsloth's passes", lambda: functional(lora_as_unsloth(i))),
        ("addmm by hand, as few as it can", lambda: functional(lora_by_addmm(i))),
    ):
        with suppress(Unavailable):
            yield name, make(), weights


def peers(dropout_p: float, adapter: torch.dtype) -> Iterator[tuple[str, float]]:
    """(name, extra passes) of each peer that has such a layer."""
    width = 256  # unlike any other size here
    for name, run, _ in itertools.islice(layers(dropout_p, adapter, width), 1, None):
        # The weight has an activation's number of elements here: its two reads are the frozen layer's, too.
        yield name, eager_passes(run, width * width) - 2


def memory(dropout_p: float, adapter: torch.dtype) -> Iterator[tuple[str, float]]:
    """(name, what is saved for the backward in activations [M, K] of bf16); r is 1/64 of the width."""
    width = 1024
    for name, run, weights in layers(dropout_p, adapter, width):
        yield name, saved(run, weights) / (width * width * 2)


def skinny(m: int, k: int, r: int, dropout_p: float) -> Iterator[tuple[str, dict[str, KernelTraffic], int]]:
    """(what, traffic by kernel, least bytes) of each skinny product of a bf16 activation [m, k]."""
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    lora_a, s = torch.zeros(r, k), torch.zeros(m, r)
    drop = Dropout.of(dropout_p, torch.tensor(7) if dropout_p else None)
    both = reads_once(x, r)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "S = drop(x) Aᵀ": (lambda: reduce_rows(x, lora_a, drop), x.nbytes + lora_a.nbytes + s.nbytes),
        "dA = dSᵀ drop(x)": (
            lambda: reduce_columns(x, s, drop, 2.0, torch.float32, rank_first=True),
            x.nbytes + s.nbytes + lora_a.nbytes,
        ),
    }  # fmt: skip
    if both:
        calls["dY B and dB = dYᵀ S"] = (
            lambda: reduce_both(x, lora_a.T, s, 2.0, torch.float32), x.nbytes + 2 * lora_a.nbytes + 2 * s.nbytes,
        )  # fmt: skip
    for name, (call, least) in calls.items():
        with count_traffic(distinct=True) as traffic:
            call()
        yield name, traffic.kernels, least


def partial_sums(kernels: dict[str, KernelTraffic]) -> int:
    """Bytes of partial sums that a product wrote and read again: `_add_partials_kernel` loads nothing else."""
    return 2 * kernels["_add_partials_kernel"].loaded if "_add_partials_kernel" in kernels else 0


def least_partial_sums(m: int, n: int, r: int) -> float:
    """Bytes of partial sums, written and read, of one read of [m, n] that sums along both sides.

    With c blocks of columns and z of rows, c · z = P, they are 8 r (c m + z n), least where c m = z n.
    """
    return 16 * r * math.sqrt(TARGET_PROGRAMS * m * n)


def markdown() -> str:
    """The table."""
    lines = [
        "# Memory traffic of lora_linear, and what it saves, counted",
        "",
        "Written by `TRITON_INTERPRET=1 python -m tests.gpu_proof.traffic`. No GPU is needed, and none was used.",
        "",
        f"## Skinny kernels, M = {M}, K = N = {WIDTH}, bf16, float32 adapter",
        "",
        "*requested*: bytes of every lane's load and store, repeats included (caches serve the small operand's).",
        "*distinct*: each byte once a launch, what reaches memory if L2 serves every repeat. *least*: the operands",
        "once, the results once. *partial sums*: what the programs of one launch write, in float32, and the next",
        "launch reads at once; they fit an L2 of 50 MB. One read of [M, N] by P programs that sums both ways moves",
        f"at least 16 r √(P·M·N) bytes of them, {least_partial_sums(M, WIDTH, 16) / 1e6:.1f} MB here at r = 16 for "
        f"P = {TARGET_PROGRAMS}, about one an SM.",
        "",
        "| product | p | kernel | launches | requested | distinct | partial sums | distinct / least | without them |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (16, 64):
        for p in (0.0, 0.1):
            for name, kernels, least in skinny(M, WIDTH, r, p):
                distinct = sum(k.distinct for k in kernels.values())
                partial = partial_sums(kernels)
                of_product = f"{partial / 1e6:.1f} MB | {distinct / least:.3f} | {(distinct - partial) / least:.3f}"
                for j, (kernel, k) in enumerate(kernels.items()):
                    lines.append(
                        f"| {f'{name}, r = {r}' if not j else ''} | {f'{p:g}' if not j else ''} | {kernel.strip('_')} "
                        f"| {k.launches} | {k.total / 1e6:.1f} MB | {k.distinct / 1e6:.1f} MB "
                        f"| {of_product if not j else ' |  | '} |"
                    )
    lines += [
        "",
        "## Extra passes over activations, forward and backward, K = N, r = 16, bf16",
        "",
        "Ours are those that `interpreted/test_lora_linear.py` counts. A pass over a float32 copy of an activation",
        "counts two, over a mask of bytes a half.",
        "",
        "| | p = 0, bf16 adapter | p = 0, float32 adapter | p = 0.1, bf16 adapter | p = 0.1, float32 adapter |",
        "|---|---|---|---|---|",
    ]
    columns = list(itertools.product((0.0, 0.1), (torch.bfloat16, torch.float32)))
    counted = [dict(peers(p, dtype)) for p, dtype in columns]
    lines += [
        f"| lora_ops, {route} | {' | '.join([str(n)] * 4)} |" for route, n in (("K-step route", 3), ("β=1 route", 7))
    ]
    for name in dict.fromkeys(name for column in counted for name in column):
        cells = (f"{column[name]:g}" if name in column else "no dropout" for column in counted)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Saved for the backward, in activations [M, K] of bf16, M = K = N = 1024, r = 16",
        "",
        "Weights and adapters not counted. Ours: x, and S = drop(x) Aᵀ in float32, 2 r / K of it; no mask.",
        "",
        "| | p = 0, bf16 adapter | p = 0, float32 adapter | p = 0.1, bf16 adapter | p = 0.1, float32 adapter |",
        "|---|---|---|---|---|",
    ]
    held = [dict(memory(p, dtype)) for p, dtype in columns]
    for name in held[0]:
        cells = (f"{column[name]:.3g}" if name in column else "no dropout" for column in held)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    install()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(markdown())
    print(f"wrote {TABLE}")
