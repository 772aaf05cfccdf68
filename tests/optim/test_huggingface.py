"""The names of Hugging Face's Trainer, and a Trainer that is stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_ops.optim import AdamW
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
