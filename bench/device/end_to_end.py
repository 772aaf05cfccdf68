"""A step of a Llama-3-8B-shaped model, forward and backward to the adapters: lora_ops.inject against PEFT.

Weights are random and drawn on the device. There are fewer layers than the model's 32, and its vocabulary is cut in
proportion, so that the output embedding keeps its share of the time. Contenders share the base model's tensors; before
any timing their logits, loss and gradients are compared with float32 on the same weights, on a short sequence without
dropout: at most twice as far off as PEFT with everything in bfloat16 over dense weights. This finds what is wired
wrongly; the ops themselves are held to 1.25 by their own checks.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_ops
from bench.clocks import StepClock
from bench.device.context import Context
from bench.measure import OURS, Comparison, Contender, Unavailable, measure, one_line
from bench.peers import bnb_linear, load
from bench.plan import Effort
from lora_ops.functional import dequantize_nf4, quantize_nf4
from lora_ops.runtime.crossovers import force

ADAPTER = "bf16 adapter"
# Roundings of a deep model are correlated: PEFT's own errors with adapters of one or the other dtype differ by up to
# 1.35 times on the tiny model, where op by op 1.25 holds.
SLACK = 2.0
EFFORT = Effort(min_rounds=4, max_rounds=10, seconds=4.0, warmup=2)


@dataclass(frozen=True)
class Shape:
    """What is built and run.

    Attributes:
        hidden, mlp, heads, kv_heads, layers, vocab: of the model.
        sequences: tokens of the one sequence of a step.
        checked: tokens of the sequence that results are compared on.
        rank: of the adapters on all linear layers but the output embedding.
        dropouts: of the adapters.
    """

    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 8
    vocab: int = 128256 * 8 // 32
    sequences: tuple[int, ...] = (8192, 2048, 4096)
    checked: int = 256
    rank: int = 16
    dropouts: tuple[float, ...] = (0.1, 0.0)


DRY = Shape(64, 128, 4, 2, 2, 64, sequences=(16,), checked=48, rank=4, dropouts=(0.1,))


def build(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """The base model with random weights, drawn where they stay."""
    transformers = load("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, rms_norm_eps=1e-5, use_cache=False,
        max_position_embeddings=max(*shape.sequences, shape.checked), attn_implementation="sdpa",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that adapters go to, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy that shares all but the linear layers, which `make` answers."""
    model = sharing(model)
    for name, linear in targets(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(linear))
    return model


def adapted(model: nn.Module, shape: Shape, *, fp32_adapter: bool) -> Any:
    """PEFT's model around it, with adapters of given values (PEFT's own B is zero, which would hide errors)."""
    peft = load("peft")
    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=0.0, bias="none", target_modules=list(targets(model)),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in sorted(adapters(model).items()):
            std = 1 / math.sqrt(t.shape[1]) if "lora_A" in name else 0.1 / math.sqrt(shape.rank)
            # Rounded to bfloat16, so that adapters of both dtypes hold the same values.
            t.copy_((torch.randn(t.shape, generator=generator) * std).bfloat16())
    return model


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def set_dropout(model: nn.Module, p: float) -> None:
    """The dropout of every adapter; at 0 none at all, as PEFT makes it."""
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(p) if p else nn.Identity()


def step(model: nn.Module, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """The model's output, and the gradients of the adapters."""
    wanted = adapters(model)
    output = model(input_ids=ids, labels=ids)
    return output, dict(zip(wanted, torch.autograd.grad(output.loss, list(wanted.values())), strict=True))


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What is compared, in float64: logits, loss, all gradients of A and all of B (each scaled to its tensor)."""
    set_dropout(model, 0.0)
    output, grads = step(model, ids)
    found = {"logits": output.logits.detach().double().flatten(), "loss": output.loss.detach().double().view(1)}
    for kind in ("lora_A", "lora_B"):
        found[f"gradients of {kind}"] = torch.cat([g.double().flatten() for name, g in grads.items() if kind in name])
    return found


@dataclass
class Judge:
    """Compares results with float32 on the same weights; `exact` and `own` build the models that it measures by."""

    exact: Callable[[], nn.Module]
    own: Callable[[], nn.Module]
    ids: Tensor

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        return results(self.exact(), self.ids)

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """Errors allowed: of the loss, one number, whatever that of the logits allows it."""
        limits = {name: SLACK * self._error(name, t) for name, t in results(self.own(), self.ids).items()}
        return limits | {"loss": max(limits["loss"], limits["logits"])}

    def _error(self, name: str, got: Tensor) -> float:
        return float((got - self.truth[name]).norm() / self.truth[name].norm())

    def wrong(self, model: nn.Module) -> str | None:
        """Why the model's results are wrong, or None."""
        got = {name: self._error(name, t) for name, t in results(model, self.ids).items()}
        off = [f"{name}: relative error {e:.2e}, limit {self.limits[name]:.2e}" for name, e in got.items()
               if not e <= self.limits[name]]  # fmt: skip
        return "; ".join(off) or None


@dataclass
class Entry:
    """A contender's model, built once and run at every length."""

    make: Callable[[], nn.Module]
    verdict: str | None = None
    _built: list[nn.Module] = field(default_factory=list)

    def model(self, judge: Judge) -> nn.Module:
        """The model, checked when it is first asked for."""
        if not self._built:
            model = self.make()
            self.verdict = judge.wrong(model)
            self._built.append(model)
        return self._built[0]


def lora_entries(base: nn.Module, shape: Shape) -> tuple[dict[str, Entry], Callable[[], nn.Module], nn.Module]:
    """Contenders over the dense weights; the float32 model; and the dense model of torch's own error."""

    def exact() -> nn.Module:
        return adapted(copy.deepcopy(base).float(), shape, fp32_adapter=True)

    entries = {}
    for suffix, fp32 in (("", True), (f", {ADAPTER}", False)):
        make = functools.partial(_peft, base, shape, fp32)
        entries[f"{OURS}{suffix}"] = Entry(lambda make=make: lora_ops.inject(make()))
        entries[f"PEFT{suffix}"] = Entry(make)
    return entries, exact, base


def qlora_entries(base: nn.Module, shape: Shape) -> tuple[dict[str, Entry], Callable[[], nn.Module], nn.Module]:
    """The same over double-quantized NF4 weights; PEFT also over what they decode to, dense."""

    def quantized(linear: nn.Linear) -> Any:
        return quantize_nf4(linear.weight, double_quant=True)

    def dense(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        q = quantized(linear)
        layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(dequantize_nf4(q, dtype=dtype), requires_grad=False)
        return layer

    def exact() -> nn.Module:
        full = with_linears(base, lambda linear: dense(linear, torch.float32))
        return adapted(copy.deepcopy(full).float(), shape, fp32_adapter=True)

    decoded = with_linears(base, lambda linear: dense(linear, linear.weight.dtype))
    entries = {}
    for suffix, fp32 in (("", True), (f", {ADAPTER}", False)):
        ours = functools.partial(_peft, base, shape, fp32)
        entries[f"{OURS}{suffix}"] = Entry(lambda make=ours: lora_ops.inject(make(), quantize="nf4"))
    entries["PEFT"] = Entry(functools.partial(_peft, decoded, shape, True))
    entries["PEFT + bitsandbytes"] = Entry(lambda: _bitsandbytes(base, shape, quantized))
    return entries, exact, decoded


def _peft(base: nn.Module, shape: Shape, fp32_adapter: bool) -> Any:
    return adapted(sharing(base), shape, fp32_adapter=fp32_adapter)


def _bitsandbytes(base: nn.Module, shape: Shape, quantized: Callable[[nn.Linear], Any]) -> Any:
    model = with_linears(base, lambda linear: bnb_linear(quantized(linear), None, linear.weight.dtype))
    return adapted(model, shape, fp32_adapter=True)


def _contender(entry: Entry, judge: Judge, ids: Tensor, p: float) -> Contender:
    model = entry.model(judge)
    contender = Contender(lambda: step(model, ids), lambda: entry.verdict, 0)

    def check() -> str | None:
        """What the short sequence said; here its memory is measured, and what runs is noted."""
        if entry.verdict is None:
            set_dropout(model, p)
            with lora_ops.trace() as record:
                contender.run()
            contender.note = ", ".join(sorted(record.backends("lora_linear")))
            contender.peak_bytes = _peak(model, contender.run)
        return entry.verdict

    contender.check = check
    return contender


def _peak(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that the model and one step of it need at most: 0 on the CPU, where torch does not count."""
    held = {t.data_ptr(): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}
    if not next(model.parameters()).is_cuda:
        return 0
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return sum(held.values()) + torch.cuda.max_memory_allocated() - before


def end_to_end(context: Context) -> Iterator[str]:
    """LoRA and QLoRA at every length and dropout; yields after each comparison."""
    shape = DRY if context.dry else Shape()
    device, dtype = context.plan.device, context.plan.dtype
    try:
        load("peft")
        base = build(shape, device, dtype)
    except Unavailable as error:
        context.run.notes.append(f"- end to end: not run: {error}")
        yield f"not run: {error}"
        return
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    context.run.notes.append(
        f"- end to end: {shape.layers} layers of Llama-3-8B's shape, vocabulary {shape.vocab:,}, {weights / 1e9:.2f} G "
        "weights in products; forward and backward to adapters on all linear layers, no optimizer; one sequence a "
        "step; memory: the model and the most that a step adds to it"
    )
    generator = torch.Generator().manual_seed(2)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, shape.vocab, (1, n), generator=generator).to(device)

    clock, effort = StepClock(device), context.plan.effort if context.dry else EFFORT
    modes = {}
    for mode, make in (("LoRA", lora_entries), ("QLoRA", qlora_entries)):
        entries, exact, dense = make(base, shape)
        modes[mode] = entries, Judge(exact, functools.partial(_peft, dense, shape, False), tokens(shape.checked))
    with force(**context.run.crossovers):
        for p, m, (mode, (entries, judge)) in itertools.product(shape.dropouts, shape.sequences, modes.items()):
            ids = tokens(m)
            makers = {name: functools.partial(_contender, entry, judge, ids, p) for name, entry in entries.items()}
            flops = 4.0 * m * weights  # forward and dX; attention is not counted
            comparison = Comparison(
                "end_to_end", f"{mode}, p={p:g}", m, shape.hidden, shape.mlp, flops, "PEFT", makers, shape.rank
            )  # fmt: skip
            rows = measure(comparison, clock, context.ceilings, effort)
            context.run.rows += rows
            yield f"{comparison.id}: {one_line(rows)}"
