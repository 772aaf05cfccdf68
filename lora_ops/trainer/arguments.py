"""The arguments of supervised fine-tuning, named as in Hugging Face's own scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SFTArguments:
    """What to train, on what, and how. Names are those of transformers, TRL and PEFT.

    Raises:
        ValueError: if a value is out of its range; the message names the argument.
    """

    model_name_or_path: str = field(metadata={"help": "a local folder or a Hub name; weights must be safetensors"})
    dataset: str = field(
        metadata={
            "help": "a .json, .jsonl, .csv (each also .gz, .bz2 or .xz) or .parquet file, a folder of save_to_disk, or "
            "a Hub name; columns: prompt + completion, messages, text, or instruction (+ input) + output; with "
            "messages also tools and chat_template_kwargs"
        }
    )
    output_dir: str = field(metadata={"help": "where the adapter (PEFT format) and checkpoints go"})
    dataset_split: str = _help("the dataset's split", "train")

    full: bool = _help("train the model's own weights instead of adapters; needs quantize 'none'", False)
    lora_r: int = _help("rank of the adapters", 16)
    lora_alpha: int = _help("LoRA's alpha; the update is scaled by alpha / r", 32)
    lora_dropout: float = _help("dropout on the adapters' input", 0.0)
    target_modules: str = _help("'all-linear' or module names with commas between, as in q_proj,v_proj", "all-linear")
    quantize: str = _help("'nf4' stores the frozen weights in 4 bits (QLoRA); 'none' leaves them", "nf4")
    skip_modules: str | None = _help(
        "modules that stay out of NF4: names or regular expressions with commas between, as in down_proj,layers.0", None
    )

    learning_rate: float = _help("peak learning rate", 2e-4)
    lr_scheduler_type: str = _help("transformers' schedule", "cosine")
    warmup_steps: int = _help("steps of linear warm-up", 0)
    weight_decay: float = _help("AdamW's weight decay", 0.0)
    max_grad_norm: float = _help("gradients are clipped to this norm; 0 leaves them", 1.0)
    optim: str = _help(
        "transformers' optimizer name; adamw_8bit, adamw_bnb_8bit, paged_adamw_32bit and paged_adamw_8bit are "
        "lora_ops.optim.AdamW, on any device and without bitsandbytes",
        "adamw_torch",
    )
    page_budget: str | None = _help(
        "most bytes of AdamW's states in fast memory, as in 2GiB; others in a file, or pinned on CUDA (paged_*: 2GiB)",
        None,
    )
    page_dir: str | None = _help(
        "folder of that file; a temporary one if not given. On CUDA: puts a file behind as much pinned memory", None
    )
    host_budget: str | None = _help(
        "on CUDA: most bytes of pinned host memory, as in 8GiB; others in a file. All are pinned if it is not given",
        None,
    )
    num_train_epochs: float = _help("passes over the dataset, unless max_steps is positive", 1.0)
    max_steps: int = _help("optimizer steps; -1 goes by num_train_epochs", -1)
    per_device_train_batch_size: int = _help("sequences a step and device", 8)
    gradient_accumulation_steps: int = _help("batches a step", 1)
    max_length: int | None = _help(
        "longer sequences are cut to this many tokens; if not given, 1024 or the model's positions if they are fewer",
        None,
    )
    packing: bool = _help("fill sequences with several examples", False)
    assistant_only_loss: bool = _help(
        "train on the assistant's turns alone, by the generation marks of the chat template; else messages train "
        "on every token, also the user's turns, and prompt + completion on the completion alone",
        False,
    )

    # TRL turns both on by default; here they are off until asked for.
    bf16: bool = _help("load and compute in bfloat16", False)
    gradient_checkpointing: bool = _help("recompute activations in backward: less memory, more time", False)

    use_cpu: bool = _help("stay on the CPU even where there is a GPU", False)
    seed: int = _help("seed of adapters, order and dropout", 0)
    logging_steps: int = _help("steps between log lines", 10)
    save_steps: int = _help("steps between checkpoints; 0 saves only the final adapter", 0)
    resume_from_checkpoint: str | None = _help("a checkpoint folder, or 'last' for output_dir's newest whole one", None)
    report_to: str = _help("transformers' reporting integrations", "none")
    disable_tqdm: bool = _help("no progress bars", False)
    traceback: bool = _help("show where an error was raised, not only what it says", False)

    def __post_init__(self) -> None:
        if self.quantize not in ("nf4", "none"):
            raise ValueError(f"quantize: expected 'nf4' or 'none', got {self.quantize!r}")
        if self.full and self.quantize != "none":
            raise ValueError(f"full: expected with quantize 'none', got {self.quantize!r}: 4-bit weights are frozen")
        if self.skip_modules is not None and self.quantize == "none":
            raise ValueError("skip_modules: expected with quantize 'nf4', got 'none', which quantizes nothing")
        for name in ("page_dir", "host_budget"):
            if getattr(self, name) is not None and not self.pages():
                raise ValueError(f"{name}: expected together with page_budget or a paged optim")
        self._check_numbers()
        for name in ("dataset", "output_dir", "target_modules"):
            if not getattr(self, name).strip(" ,"):
                raise ValueError(f"{name}: expected a name, got {getattr(self, name)!r}")
        path = Path(self.model_name_or_path)
        if (path.is_absolute() or self.model_name_or_path.startswith(".")) and not path.is_dir():
            raise ValueError(f"model_name_or_path: there is no folder {self.model_name_or_path}")

    def _check_numbers(self) -> None:
        sizes = "lora_r lora_alpha per_device_train_batch_size gradient_accumulation_steps max_length logging_steps"
        for name in sizes.split():
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        for name in ("learning_rate", "num_train_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "save_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps: expected a positive number or -1, got {self.max_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number in [0, 2^32), got {self.seed}")

    def pages(self) -> bool:
        """Tell whether the optimizer's states are paged."""
        return self.page_budget is not None or self.optim.startswith("paged_")

    def targets(self) -> str | list[str]:
        """Give `target_modules` as PEFT takes it.

        Returns:
            "all-linear", or a list of module names.
        """
        if self.target_modules == "all-linear":
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    def skipped(self) -> list[str] | None:
        """Give `skip_modules` as `inject` takes it.

        Returns:
            Names and regular expressions, or None.
        """
        if self.skip_modules is None:
            return None
        return [name.strip() for name in self.skip_modules.split(",") if name.strip()]
