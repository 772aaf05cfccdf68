"""LoRA forward and backward (dX, dA, dB) over a frozen dense or NF4 weight; the baseline is the frozen dense layer's
forward and dX, so that a ratio is what the adapter costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.by_hand import lora_as_unsloth, lora_by_addmm
from bench.compiled import compiling
from bench.measure import OURS, Comparison, Contender
from bench.peers import eager_lora, given_dropout, peft_layer
from bench.plan import Plan
from bench.suites.common import Judge, no_grad, on_route, ours, tensor_bytes
from lora_ops.functional import lora_linear, nf4_linear
from tests.cases import LinearCase, LinearInputs, rounded_weight

# What crossovers.force is told so that a dense weight takes this route.
ROUTES = {"K-step": {"kstep_min_m": 0}, "β=1": {"kstep_min_m": 2**62}}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_backward(plan: Plan) -> Iterator[Comparison]:
    """Dense and NF4, each adapter dtype, with and without dropout."""
    for (n, k), m, r in itertools.product(plan.lora_shapes, plan.lora_tokens, plan.ranks):
        for weight, adapter, p in itertools.product(("dense", "nf4"), plan.adapter_dtypes, plan.dropouts):
            case = LinearCase(m, n, k, r, plan.dtype, weight=weight, adapter_dtype=adapter, dropout_p=p)
            yield compare(plan, case.inputs(plan.device))


def generation(plan: Plan) -> Iterator[Comparison]:
    """The forward without autograd over an NF4 weight, as in generation; the baseline is nf4_linear."""
    for (n, k), m, r in itertools.product(plan.lora_shapes, plan.generation_tokens, plan.ranks):
        case = LinearCase(m, n, k, r, plan.dtype, weight="nf4", adapter_dtype=plan.dtype)
        yield _generation(plan, case.inputs(plan.device))


def _generation(plan: Plan, i: LinearInputs) -> Comparison:
    c, judge, (a, b) = i.case, Judge(i), i.adapter()
    least = i.nf4.nbytes + tensor_bytes(i.x, i.dy, a, b)

    def contender(run: Callable[[], Tensor]) -> Contender:
        run = no_grad(run)
        return Contender(run, lambda: judge.wrong({"y": run()}), least)

    def lora_ops() -> Contender:
        return contender(lambda: lora_linear(i.x, i.nf4, a, b, scale=c.scale))

    def without() -> Contender:
        # The yardstick: bench/suites/nf4_linear.py checks it.
        return Contender(no_grad(lambda: nf4_linear(i.x, i.nf4)), lambda: None, i.nf4.nbytes + tensor_bytes(i.x, i.dy))

    def peft() -> Contender:
        layer = peft_layer(i)
        return contender(lambda: layer(i.x))

    makers = {**ours(plan, lora_ops), "nf4_linear": without, "PEFT + bitsandbytes": peft}
    flops = 2.0 * c.m * (c.n * c.k + c.r * (c.n + c.k))
    return Comparison("lora_generation", f"r={c.r}", c.m, c.n, c.k, flops, "nf4_linear", makers, c.r)


def compiled(plan: Plan) -> Iterator[Comparison]:
    """torch.compile of the eager formula over a dense weight, in a suite of its own for the time that it may take."""
    (n, k), m, r = plan.lora_shapes[0], plan.lora_tokens[0], plan.ranks[0]
    for adapter, p in itertools.product(plan.adapter_dtypes, plan.dropouts):
        case = LinearCase(m, n, k, r, plan.dtype, weight="dense", adapter_dtype=adapter, dropout_p=p)
        yield compare(plan, case.inputs(plan.device), with_compiler=True)


def compare(plan: Plan, i: LinearInputs, *, with_compiler: bool = False) -> Comparison:
    """Contenders for forward and backward over these operands."""
    c, judge = i.case, Judge(i)
    m, n, k, r = c.m, c.n, c.k, c.r
    a0, b0 = i.adapter()
    # Forward reads x and W and writes y; backward reads dY, W and x and writes dX; the adapters once each way.
    activations = 3 * i.x.nbytes + 2 * i.dy.nbytes + 2 * tensor_bytes(a0, b0)

    def contender(forward: Forward, weight_bytes: int, *, checked: Forward | None = None) -> Contender:
        """`checked` is the same computation with the mask that truth uses, where `forward` draws one of its own."""
        x, a, b = (t.detach().requires_grad_() for t in (i.x, a0, b0))

        def run(fn: Forward = forward) -> dict[str, Tensor]:
            y = fn(x, a, b)
            dx, da, db = torch.autograd.grad(y, (x, a, b), i.dy)
            return {"y": y.detach(), "dx": dx, "dlora_a": da, "dlora_b": db}

        return Contender(run, lambda: judge.wrong(run(checked or forward)), activations + 2 * weight_bytes)

    def lora_ops() -> Contender:
        def forward(x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None = None) -> Tensor:
            return lora_linear(x, i.weight, a, b, scale=c.scale, dropout_p=c.dropout_p, seed=seed)

        def checked(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return forward(x, a, b, i.seed if c.dropout_p else None)

        return contender(forward, i.weight.nbytes, checked=checked)

    def frozen() -> Contender:
        w, x = rounded_weight(i.weight, i.x.dtype), i.x.detach().requires_grad_()

        def run() -> Tensor:
            return torch.autograd.grad(F.linear(x, w), x, i.dy)[0]

        # The yardstick, not a contender: it computes another function, torch's own, so there is nothing to check.
        return Contender(run, lambda: None, 2 * (i.x.nbytes + i.dy.nbytes + w.nbytes))

    def peft() -> Contender:
        layer = peft_layer(i)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = i.x.detach().requires_grad_()

        def run() -> dict[str, Tensor]:
            y = layer(x)
            dx, da, db = torch.autograd.grad(y, (x, a, b), i.dy)
            return {"y": y.detach(), "dx": dx, "dlora_a": da, "dlora_b": db}

        def check() -> str | None:
            own = layer.lora_dropout["default"]
            layer.lora_dropout["default"] = given_dropout(i)
            try:
                return judge.wrong(run())
            finally:
                layer.lora_dropout["default"] = own

        return Contender(run, check, activations + 2 * i.weight.nbytes)

    def eager() -> Contender:
        forward = eager_lora(i, nn.Dropout(c.dropout_p) if c.dropout_p else nn.Identity())
        return contender(
            forward, rounded_weight(i.weight, i.x.dtype).nbytes, checked=eager_lora(i, given_dropout(i))
        )  # fmt: skip

    def by_compiler() -> Contender:
        """The same formula; compiled a second time with a given mask, to be checked."""
        dropouts = [nn.Dropout(c.dropout_p), given_dropout(i)] if c.dropout_p else [nn.Identity()]
        forwards = [torch.compile(eager_lora(i, d), fullgraph=True, backend=plan.compiler) for d in dropouts]
        inner = contender(forwards[0], rounded_weight(i.weight, i.x.dtype).nbytes, checked=forwards[-1])

        def check() -> str | None:
            with compiling():
                inner.run()
                return inner.check()

        return Contender(inner.run, check, inner.bytes)

    def addmm() -> Contender:
        return contender(lora_by_addmm(i), i.weight.nbytes, checked=lora_by_addmm(i, given_mask=True))

    def unsloth() -> Contender:
        return contender(lora_as_unsloth(i), i.weight.nbytes)

    makers: dict[str, Callable[[], Contender]] = ours(plan, lora_ops)
    if plan.gpu_contenders and c.weight == "dense":
        makers |= {f"{OURS} {route}": on_route(lora_ops, **changes) for route, changes in ROUTES.items()}
    makers["frozen dense"] = frozen
    if c.weight == "dense":
        makers |= {"PEFT": peft, "eager PEFT formula": eager}
    else:
        makers |= {"PEFT + bitsandbytes": peft}
    makers["addmm by hand"] = addmm
    if plan.gpu_contenders:
        makers["Unsloth's way"] = unsloth
    if with_compiler:
        makers = {name: makers[name] for name in (OURS, "frozen dense", "eager PEFT formula")}
        makers["torch.compile"] = by_compiler
    adapter = str(c.adapter_dtype).removeprefix("torch.")
    variant = f"{c.weight}, r={r}, p={c.dropout_p:g}, {adapter} adapter"
    flops = 4.0 * m * n * k + 6.0 * m * r * (n + k)
    op = "lora_compiled" if with_compiler else "lora_linear"
    return Comparison(op, variant, m, n, k, flops, "frozen dense", makers, r)
