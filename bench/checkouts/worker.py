"""What one checkout answers: hashes of results, or times of calls; run by path, with that checkout on PYTHONPATH.

Only names that README gives users are used, so that checkouts of any age can be asked.

    python worker.py bits       # {"case": "sha256", ...} as JSON, by the backend and ISA of the environment
    python worker.py times      # answers each line "case" on stdin with seconds a call
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import lora_ops
from lora_ops.functional import dequantize_nf4, lora_linear, nf4_linear, quantize_nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 33) if INTERPRETED else (1, 3, 4, 5, 8, 33, 130)
RANKS = (3, 16) if INTERPRETED else (1, 3, 16, 33, 64)
Case = tuple[str, Iterable[Tensor | None]]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def digest(tensors: Iterable[Tensor | None]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        if t is None:
            found.update(b"none")
        else:
            found.update(f"{t.dtype} {tuple(t.shape)}".encode())
            found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def codecs() -> Iterator[Case]:
    for dtype, block, double, shape in itertools.product(DTYPES, (32, 64, 256), (False, True), ((7, 130), (64, 256))):
        q = quantize_nf4(draw(*shape, dtype=dtype), block_size=block, double_quant=double)
        yield f"quantize {dtype} {block} {double} {shape}", q.tensors()
        yield f"dequantize {dtype} {block} {double} {shape}", [dequantize_nf4(q)]
        if not INTERPRETED:
            out = torch.empty(shape[::-1], dtype=dtype)
            yield f"dequantize transposed {dtype} {block} {double} {shape}", [dequantize_nf4(q, out=out.t())]


def grads(y: Tensor, *operands: Tensor) -> list[Tensor | None]:
    given = torch.autograd.grad(y, operands, draw(*y.shape, dtype=y.dtype, seed=9), allow_unused=True)
    return [y, *given]


def linears() -> Iterator[Case]:
    for dtype, m, (n, k) in itertools.product(DTYPES, ROWS, ((64, 128), (67, 190))):
        w = draw(n, k, dtype=dtype, seed=1) / k**0.5
        bias = draw(n, dtype=dtype, seed=2).requires_grad_()
        x = draw(m, k, dtype=dtype, seed=3).requires_grad_()
        packed = [quantize_nf4(w, double_quant=double) for double in (False, True)]
        for i, q in enumerate(packed):
            yield f"nf4_linear {dtype} {m} {n} {k} double={i}", grads(nf4_linear(x, q, bias), x, bias)
            with torch.no_grad():
                yield f"nf4_linear plain {dtype} {m} {n} {k} double={i}", [nf4_linear(x, q)]
        for r, p, (kind, weight) in itertools.product(RANKS, (0.0, 0.1), (("dense", w), ("nf4", packed[0]))):
            for adapter in {torch.float32, dtype}:
                a = draw(r, k, dtype=adapter, seed=4).requires_grad_()
                b = draw(n, r, dtype=adapter, seed=5).requires_grad_()
                y = lora_linear(x, weight, a, b, scale=0.5, bias=bias, dropout_p=p, seed=11)
                yield f"lora_linear {dtype} {m} {n} {k} {r} {p} {kind} {adapter}", grads(y, x, a, b, bias)
        if dtype != torch.float32:
            continue
        x3 = draw(2, m, 3 * k, seed=6)[..., ::3].requires_grad_()
        y = lora_linear(x3, packed[1], a, b, scale=2.0)
        yield f"lora_linear strided {m} {n} {k}", grads(y, x3, a, b)


def optimizers() -> Iterator[Case]:
    for dtype, bits, paged, rounding in itertools.product(DTYPES, (32, 8), (False, True), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            params = [draw(n, 64, dtype=dtype, seed=n).requires_grad_() for n in (1, 100, 999)]
            pages = {"page_budget": 2 * 65536, "extent_bytes": 65536, "page_dir": folder} if paged else {}
            optimizer = lora_ops.optim.AdamW(
                params, 1e-2, state_bits=bits, stochastic_rounding=rounding, seed=3, **pages
            )
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = draw(*p.shape, dtype=dtype, seed=10 * step + i)
                optimizer.step()
            state = optimizer.state_dict()["state"]
            tensors = [t for i in sorted(state) for _, t in sorted(state[i].items()) if isinstance(t, Tensor)]
            yield f"AdamW {dtype} {bits} paged={paged} rounding={rounding}", [*params, *tensors]
            optimizer.close()


def models() -> Iterator[Case]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    for dtype, quantize in itertools.product((torch.float32, torch.bfloat16), (None, "nf4")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
        model = lora_ops.inject(model, r=4, lora_dropout=0.1, quantize=quantize)
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        keys = torch.tensor(list(" ".join(model.state_dict()).encode()))
        yield f"Llama {dtype} {quantize}", [loss, keys, *model.state_dict().values(), *trained.values()]


def bits() -> None:
    torch.set_num_threads(1)
    parts = [codecs, linears] + ([] if INTERPRETED else [optimizers, models])
    found = {name: digest(tensors) for part in parts for name, tensors in part()}
    print(json.dumps(found))


def calls() -> dict[str, Callable[[], object]]:
    """What is timed: one layer, forward and backward, and steps of the optimizer."""
    found: dict[str, Callable[[], object]] = {}
    for dtype, m, n in itertools.product((torch.float32, torch.bfloat16), (1, 16, 256), (256, 2048)):
        x, w = draw(m, n, dtype=dtype), draw(n, n, dtype=dtype, seed=1) / n**0.5
        a, b = draw(16, n, seed=4).requires_grad_(), draw(n, 16, seed=5).requires_grad_()
        q = quantize_nf4(w, double_quant=True)
        dy = draw(m, n, dtype=dtype, seed=6)

        def layer(x: Tensor = x, w: object = w, a: Tensor = a, b: Tensor = b, dy: Tensor = dy, p: float = 0.05) -> None:
            x = x.detach().requires_grad_()
            torch.autograd.grad(lora_linear(x, w, a, b, scale=2.0, dropout_p=p), (x, a, b), dy)

        name = f"{str(dtype).removeprefix('torch.')} {m}x{n}x{n}"
        found[f"lora_linear dense {name}"] = layer
        found[f"lora_linear nf4 {name}"] = lambda layer=layer, q=q: layer(w=q)
        found[f"nf4_linear {name}"] = lambda x=x, q=q: nf4_linear(x, q)
    for bits_, paged in itertools.product((32, 8), (False, True)):
        params = [draw(2048, 16, seed=i).requires_grad_() for i in range(100)]
        for p in params:
            p.grad = draw(*p.shape, seed=7)
        pages = {"page_budget": 2**20} if paged else {}
        optimizer = lora_ops.optim.AdamW(params, state_bits=bits_, **pages)
        found[f"AdamW {bits_} paged={paged}"] = optimizer.step
    return found


def seconds_a_call(call: Callable[[], object]) -> float:
    """The fastest of a few calls in a row: what interrupts one of them is not the code's."""
    spent, best = 0.0, float("inf")
    while spent < 0.03:
        begin = time.perf_counter()
        call()
        took = time.perf_counter() - begin
        spent, best = spent + took, min(best, took)
    return best


def times() -> None:
    known = calls()
    for call in known.values():
        for _ in range(3):
            call()
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        print(seconds_a_call(known[line.strip()]), flush=True)


if __name__ == "__main__":
    if not lora_ops.__file__.startswith(os.environ["PYTHONPATH"]):
        raise RuntimeError(f"expected lora_ops of {os.environ['PYTHONPATH']}, got {lora_ops.__file__}")
    {"bits": bits, "times": times}[sys.argv[1]]()
