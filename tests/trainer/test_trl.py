"""TRL's trainers that take an optimizer and no class: the same weights with states in pages as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_ops.optim import AdamW
from lora_ops.optim.huggingface import trainer_optimizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 4
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "max_grad_norm": 0.5, "warmup_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no",
    "dataloader_pin_memory": False, "seed": 0,
}  # fmt: skip


def preferences() -> Any:
    return datasets.Dataset.from_list(
        [{"prompt": f"Question: {i}?\n", "chosen": f"Answer: {i}", "rejected": "what"} for i in range(32)]
    )


def dpo(model: Any, tokenizer: Any, optimizers: Any, folder: Path) -> Any:
    args = trl.DPOConfig(output_dir=str(folder), max_length=24, **COMMON)
    return trl.DPOTrainer(
        model, args=args, train_dataset=preferences(), processing_class=tokenizer, optimizers=optimizers
    )


def grpo(model: Any, tokenizer: Any, optimizers: Any, folder: Path) -> Any:
    args = trl.GRPOConfig(output_dir=str(folder), max_completion_length=6, num_generations=2, **COMMON)
    prompts = preferences().select_columns("prompt")

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]  # differs within a group, or nothing is learned

    return trl.GRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer, optimizers=optimizers
    )


@pytest.mark.parametrize("make", [dpo, grpo])
def test_a_trainer_given_a_paged_optimizer(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    weights = []
    for name, pages in (("adamw_32bit", {}), ("paged_adamw_32bit", {"page_budget": "128KiB"})):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        cls, kwargs = trainer_optimizer(name, lr=1e-2, **pages)
        optimizer = cls(model.parameters(), **kwargs)
        trainer = make(model, tokenizer, (optimizer, None), tmp_path / name)
        assert trainer.train().global_step == STEPS
        used = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        assert used is optimizer
        assert isinstance(used, AdamW)
        if pages:
            stats = optimizer.paging_stats()
            assert {state["step"] for state in optimizer.state.values()} == {STEPS}
            assert stats.misses > STEPS
            assert stats.peak <= 128 << 10
        weights.append({key: t.clone() for key, t in trainer.model.state_dict().items()})
        optimizer.close()
    assert any(not torch.equal(t, start[key]) for key, t in weights[0].items()), "nothing was trained"
    for key, t in weights[0].items():
        assert torch.equal(weights[1][key], t), key
