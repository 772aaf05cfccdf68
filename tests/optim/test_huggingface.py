"""The names of Hugging Face's Trainer, and a Trainer that is stopped and resumed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_ops import optim
from lora_ops.optim import AdamW, embedding_weights
from lora_ops.optim.huggingface import NAMES, trainer_optimizer


def test_every_name_makes_its_optimizer() -> None:
    for name in NAMES:
        cls, kwargs = trainer_optimizer(name, lr=1e-3)
        optimizer = cls([nn.Parameter(torch.ones(3))], **kwargs)
        assert optimizer.param_groups[0]["state_bits"] == (8 if "8bit" in name else 32)
        assert (optimizer.page_budget is not None) == name.startswith("paged")
        optimizer.close()
    with pytest.raises(ValueError, match=r"optim: expected one of adamw, .*, got 'sgd'"):
        trainer_optimizer("sgd", lr=1e-3)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({"page_dir": "x"}, "page_dir: expected together with page_budget"),
        ({"page_budget": 0}, "page_budget: expected a p"),
    ],
)
def test_pages_of_an_unpaged_name_are_not_dropped(pages: dict[str, Any], message: str) -> None:
    cls, kwargs = trainer_optimizer("adamw_8bit", lr=1e-3, **pages)
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(3))], **kwargs)


class Regression(nn.Module):
    """A model in the trainer's terms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 64))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.body(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def run(folder: Path, *, resume: str | None = None, **pages: Any) -> dict[str, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(64, generator=g), "labels": torch.randn(64, generator=g)} for _ in range(64)]
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, max_grad_norm=0.1, lr_scheduler_type="cosine", weight_decay=0.1, save_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=Regression(), args=args, train_dataset=data,
        optimizer_cls_and_kwargs=trainer_optimizer("adamw_8bit", lr=1e-2, **pages),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, AdamW)
    if pages:
        stats = optimizer.paging_stats()
        assert stats.peak <= pages["page_budget"]
        assert stats.misses > 0
    result = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    optimizer.close()
    return result


def test_trainer_resumes_bit_identically(tmp_path: Path) -> None:
    """Accumulation, clipping, schedule; unpaged and uninterrupted = paged = paged and resumed from step 4."""
    pages = {"page_budget": 2 * 4096, "extent_bytes": 4096}
    whole = run(tmp_path / "a")
    paged = run(tmp_path / "b", **pages)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-4"), **pages)
    for name, p in whole.items():
        assert torch.equal(paged[name], p), name
        assert torch.equal(resumed[name], p), name


class Tied(nn.Module):
    """An embedding whose weight is that of the head, one that is frozen, one too small for 8 bits, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.words.weight
        self.positions = nn.Embedding(100, 64).requires_grad_(False)
        self.kinds = nn.Embedding(3, 64)
        self.body = nn.Linear(64, 64)


def bits_of(optimizer: AdamW, model: nn.Module) -> dict[str, int]:
    """Bits of the states of each parameter, after a step."""
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = optimizer.state_dict()["state"]
    return {
        name: 8 * state[order[id(p)]]["exp_avg"].element_size()
        for name, p in model.named_parameters()
        if id(p) in order
    }


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw"])
def test_states_of_embeddings_stay_in_32_bits(name: str) -> None:
    """In a group of their own behind those that the trainer makes, which keep their places and values."""
    model = Tied()
    cls, kwargs = trainer_optimizer(name, lr=1e-2, model=model)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == wide] for wide in (True, False))
    optimizer = cls([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], **kwargs)
    body = 8 if "8bit" in name else 32
    assert bits_of(optimizer, model) == {"words.weight": 32, "kinds.weight": 32, "body.weight": body, "body.bias": 32}
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == ([0.1, 0.0, 0.1] if body == 8 else [0.1, 0.0])
    optimizer.close()


def test_which_parameters_keep_32_bits() -> None:
    """As parameters, with names, in one group of them alone; a generator; what the optimizer does not have."""
    for make in (
        lambda m: [p for p in m.parameters() if p.requires_grad],
        lambda m: (p for p in m.parameters() if p.requires_grad),
        lambda m: [(n, p) for n, p in m.named_parameters() if p.requires_grad],
        lambda m: [{"params": m.words.weight}, {"params": m.body.parameters()}, {"params": [m.kinds.weight]}],
    ):
        model = Tied()
        optimizer = optim.AdamW8bit(make(model), params_32bit=(w for w in embedding_weights(model)))
        bits = bits_of(optimizer, model)
        assert bits == {"words.weight": 32, "kinds.weight": 32, "body.weight": 8, "body.bias": 32}
        again = optim.AdamW8bit(make(model), params_32bit=embedding_weights(model))
        again.load_state_dict(optimizer.state_dict())
        assert bits_of(again, model) == bits
    with pytest.raises(TypeError, match="params_32bit: expected several parameters, got one tensor"):
        AdamW([model.body.weight], params_32bit=model.words.weight)


def test_embeddings_that_peft_trains_whole() -> None:
    """A copy in modules_to_save is an embedding too; adapters on an embedding are not."""
    pytest.importorskip("peft", reason='pip install -e ".[test]"')
    import lora_ops
    from tests.models import llama

    model = lora_ops.inject(llama(), r=64, modules_to_save=["embed_tokens"])
    cls, kwargs = trainer_optimizer("adamw_8bit", lr=1e-2, model=model)
    bits = bits_of(cls([p for p in model.parameters() if p.requires_grad], **kwargs), model)
    assert {n for n, b in bits.items() if b == 32} == {n for n in bits if "embed_tokens.modules_to_save" in n} | {
        n for n, p in model.named_parameters() if p.requires_grad and p.numel() < 4096
    }
    assert 8 in bits.values()


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit, optim.PagedAdamW, optim.PagedAdamW8bit])
def test_lora_plus_needs_no_bitsandbytes(cls: type[AdamW], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason='pip install -e ".[test]"')
    from peft.optimizers import create_loraplus_optimizer

    import lora_ops
    from tests.models import llama

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    model = lora_ops.inject(llama(), r=4)
    optimizer = create_loraplus_optimizer(model, cls, lr=1e-4, loraplus_lr_ratio=16)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-4, 16e-4}
    assert pickle.loads(pickle.dumps(cls)) is cls
    optimizer.close()
