"""CUDA graphs: each op captured after a warm-up and replayed on changed operands, bitwise equal to eager.

A capture raises where an op waits for the GPU, as in reading a value on the host. CAPTURES maps an op's name to its
checks by case, as checks.CHECKS does; SYNCHRONIZES says of the others why they cannot be captured. An op that is
differentiable is captured together with its backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.device.checks import Check
from lora_ops.functional import (
    dequantize_blockwise8,
    dequantize_nf4,
    lora_linear,
    nf4_linear,
    quantize_blockwise8,
    quantize_nf4,
)
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime.crossovers import force
from tests.cases import LinearCase, LinearInputs, codec_weight, run_ours

BF16 = torch.bfloat16
WARM_UPS = 3  # compiles kernels, loads them and fills caches, none of which a capture allows

SYNCHRONIZES = {
    "adamw_": "copies addresses and the step's constants from the host, once a step for all tensors",
    "quantize_nf4": "tells the caller of inf and NaN, for which it reads a flag on the host; once a weight",
    "quantize_blockwise8": "tells the caller of inf and NaN, for which it reads a flag on the host",
}


@dataclass
class Captured:
    """Calls that a graph is made of.

    Attributes:
        operands: the tensors that the calls read.
        others: values that are copied into them between replays.
        call: runs the op, and answers its results by name.
    """

    operands: dict[str, Tensor]
    others: dict[str, Tensor]
    call: Callable[[], dict[str, Tensor]]


@dataclass
class Recording:
    """A graph, and the tensors that each replay writes anew."""

    results: dict[str, Tensor]
    replay: Callable[[], None]


def record_graph(call: Callable[[], dict[str, Tensor]]) -> Recording:
    """Warm up on a side stream and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return Recording(results, graph.replay)


def record_calls(call: Callable[[], dict[str, Tensor]]) -> Recording:
    """What stands for a graph on the CPU: the calls again."""
    results = {name: t.clone() for name, t in call().items()}

    def replay() -> None:
        for name, t in call().items():
            results[name].copy_(t)

    return Recording(results, replay)


def wrong_capture(case: Captured, record: Callable[[Callable[[], dict[str, Tensor]]], Recording]) -> str | None:
    """Why replays differ from eager calls on the same operands, or None."""
    first = {name: t.clone() for name, t in case.operands.items()}
    recording = record(case.call)
    seen: list[dict[str, Tensor]] = []
    for number, values in enumerate((case.others, first, case.others)):
        for name, t in case.operands.items():
            t.copy_(values[name])
        torch.manual_seed(number // 2)  # for a seed that the op draws itself; a graph reads the generator's state
        expected = {name: t.clone() for name, t in case.call().items()}
        for t in recording.results.values():
            t.fill_(float("nan") if t.is_floating_point() else 0xA5)  # a replay must write all of it
        torch.manual_seed(number // 2)
        recording.replay()
        if differ := [name for name, t in expected.items() if not torch.equal(t, recording.results[name])]:
            return f"replay {number + 1} differs from eager in {', '.join(differ)}"
        seen.append(expected)
    if same := [name for name, t in seen[0].items() if torch.equal(t, seen[1][name])]:
        return f"changed operands do not show in {', '.join(same)}: the case proves nothing"
    return None


def operands_of(inputs: LinearInputs) -> dict[str, Tensor]:
    """Every tensor of a case, by name."""
    i, weight = inputs, inputs.weight
    weights = {
        f"weight[{n}]": t for n, t in enumerate(weight.tensors() if isinstance(weight, NF4Tensor) else (weight,))
    }
    named = {"x": i.x, "dy": i.dy, "bias": i.bias, "lora_a": i.lora_a, "lora_b": i.lora_b, "seed": i.seed}
    return weights | {name: t for name, t in named.items() if t is not None}


def _linear(case: LinearCase, changes: dict[str, int], device: str) -> Captured:
    """Forward and every gradient, with the seed as an operand."""
    inputs, others = (LinearCase(**{**vars(case), "seed": seed}).inputs(device) for seed in (0, 1))

    def call() -> dict[str, Tensor]:
        with force(**changes) if changes else nullcontext():
            return run_ours(inputs)

    return Captured(operands_of(inputs), operands_of(others), call)


def _forward(case: LinearCase, device: str) -> Captured:
    """y alone, for backends that have no backward."""
    inputs, others = (LinearCase(**{**vars(case), "seed": seed}).inputs(device) for seed in (0, 1))

    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": nf4_linear(inputs.x, inputs.nf4, inputs.bias)}

    return Captured(operands_of(inputs), operands_of(others), call)


def _lora_drawn(case: LinearCase, device: str) -> Captured:
    """The scale as an operand, and a seed that the op draws itself."""
    inputs, others = (LinearCase(**{**vars(case), "seed": seed}).inputs(device) for seed in (0, 1))
    scale = torch.tensor(2.0, device=device)

    def call() -> dict[str, Tensor]:
        x, a, b = (t.detach().requires_grad_() for t in (inputs.x, *inputs.adapter()))
        y = lora_linear(x, inputs.weight, a, b, scale=scale, dropout_p=case.dropout_p)
        dx, da, db = torch.autograd.grad(y, (x, a, b), inputs.dy)
        return {"y": y.detach(), "dx": dx, "dlora_a": da, "dlora_b": db}

    return Captured(
        {**operands_of(inputs), "scale": scale},
        {**operands_of(others), "scale": torch.tensor(0.5, device=device)},
        call,
    )


def _dequantize(double_quant: bool, out: bool, device: str) -> Captured:
    shape = (96, 320)
    first, second = (
        quantize_nf4(codec_weight(*shape, dtype=BF16, seed=seed, device=device), double_quant=double_quant)
        for seed in (0, 1)
    )
    target = torch.empty(shape, dtype=BF16, device=device)

    def call() -> dict[str, Tensor]:
        return {"w": dequantize_nf4(first, out=target).clone() if out else dequantize_nf4(first)}

    operands, others = ({str(n): t for n, t in enumerate(q.tensors())} for q in (first, second))
    return Captured(operands, others, call)


def _dequantize8(signed: bool, device: str) -> Captured:
    values = [codec_weight(10_000, seed=seed, device=device) for seed in (0, 1)]
    (codes, absmax), others = (quantize_blockwise8(v if signed else v.abs(), signed=signed) for v in values)

    def call() -> dict[str, Tensor]:
        return {"x": dequantize_blockwise8(codes, absmax, signed=signed)}

    return Captured({"codes": codes, "absmax": absmax}, dict(zip(("codes", "absmax"), others, strict=True)), call)


def _linear_cases() -> Iterator[tuple[str, Callable[[str], Captured]]]:
    n, k = 256, 512
    for route, m in (("GEMV", 3), ("GEMM", 48), ("decode + cuBLAS", 520)):
        case = LinearCase(m, n, k, dtype=BF16, bias=True, double_quant=m > 48)
        yield f"{route}, {case.id}", functools.partial(_linear, case, {})
    for m in (1, 16, 64):
        case = LinearCase(m, n, k, dtype=BF16, bias=True, double_quant=True)
        yield f"y, {case.id}", functools.partial(_forward, case)


def _lora_cases() -> Iterator[tuple[str, Callable[[str], Captured]]]:
    m, n, k, r = 96, 256, 512, 16
    fp32 = torch.float32
    dense = LinearCase(m, n, k, r, BF16, weight="dense", bias=True, dropout_p=0.1, adapter_dtype=fp32)
    for route, limit in (("K-step", 0), ("β=1", 2**62)):
        yield f"{route}, {dense.id}", functools.partial(_linear, dense, {"kstep_min_m": limit})
    for tokens in (3, m, 520):
        nf4 = LinearCase(tokens, n, k, r, BF16, dropout_p=0.1, double_quant=True)
        yield nf4.id, functools.partial(_linear, nf4, {})
    drawn = LinearCase(m, n, k, r, BF16, weight="dense", dropout_p=0.5)
    yield f"seed drawn, scale a tensor, {drawn.id}", functools.partial(_lora_drawn, drawn)


def _check(make: Callable[[str], Captured], device: str) -> str | None:
    return wrong_capture(make(device), record_graph if device == "cuda" else record_calls)


def _captures() -> dict[str, dict[str, Check]]:
    def checks(cases: Iterator[tuple[str, Callable[[str], Captured]]]) -> dict[str, Check]:
        return {name: functools.partial(_check, make) for name, make in cases}

    linear, lora = checks(_linear_cases()), checks(_lora_cases())
    dense = LinearCase(33, 96, 128, dtype=BF16, weight="dense", bias=True)
    frozen = checks(iter([(dense.id, functools.partial(_linear, dense, {}))]))
    dequantize = {
        out: checks((f"double {dq}", functools.partial(_dequantize, dq, out)) for dq in (False, True))
        for out in (False, True)
    }
    blockwise8 = checks((f"signed={signed}", functools.partial(_dequantize8, signed)) for signed in (True, False))
    return {
        "nf4_linear": linear,
        "nf4_linear_dx": linear,
        "frozen_linear": frozen,
        "frozen_linear_dx": frozen,
        "lora_linear": lora,
        "lora_linear_backward": lora,
        "dequantize_nf4": dequantize[False],
        "dequantize_nf4_out": dequantize[True],
        "dequantize_blockwise8": blockwise8,
    }


CAPTURES = _captures()
