"""Supervised fine-tuning with LoRA or QLoRA: transformers, TRL and PEFT as they are; lora_ops only through `inject`.

python -m lora_ops.trainer.sft --model_name_or_path ./model --dataset data.jsonl --output_dir out --max_steps 100
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ops.trainer._files import replacing_files_in
from lora_ops.trainer._require import TRAIN_PACKAGES, require
from lora_ops.trainer.arguments import SFTArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from lora_ops.optim import PagingStats

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_FORMATS = ({"prompt", "completion"}, {"messages"}, {"text"})


@dataclass(frozen=True)
class SFTResult:
    """What a training run gave: where the adapter stands, the figures, and the trained model."""

    output_dir: str
    global_step: int
    train_loss: float
    tokens: int  # without padding
    seconds: float
    log_history: list[dict[str, Any]]
    model: PreTrainedModel  # a PeftModel, unless the model's own weights were trained
    paging: PagingStats | None = None

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens, padding not counted, by the wall clock of the training loop."""
        return self.tokens / self.seconds


def load_dataset(dataset: str, split: str = "train") -> Dataset:
    """Load a training set from a file or from the Hub and bring it into a format that TRL knows.

    Args:
        dataset: a .json, .jsonl, .csv or .parquet file, or a Hub name.
        split: which split of it.

    Returns:
        The dataset, with the columns prompt and completion, or messages, or text.

    Raises:
        ValueError: if the file is missing or of another kind, or the columns are none of those.
        ImportError: if `datasets` is not installed.
    """
    require("datasets")
    import datasets

    path = Path(dataset)
    if path.suffix in _READERS:
        if not path.is_file():
            raise ValueError(f"dataset: there is no file {dataset}")
        loaded = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split=split)
    elif path.is_file():
        raise ValueError(f"dataset: expected a file ending in {', '.join(_READERS)}, got {path.name}")
    else:
        loaded = datasets.load_dataset(dataset, split=split)
    return _trl_format(loaded)


def _trl_format(dataset: Dataset) -> Dataset:
    columns = set(dataset.column_names)
    for wanted in _FORMATS:
        if wanted <= columns:
            return dataset.select_columns(sorted(wanted))
    if {"instruction", "output"} <= columns:
        return dataset.map(_from_instruction, remove_columns=dataset.column_names)
    raise ValueError(
        "dataset: expected the columns prompt + completion, messages, text, or instruction (+ input) + output; "
        f"got {', '.join(sorted(columns)) or 'none'}"
    )


def _from_instruction(row: dict[str, Any]) -> dict[str, str]:
    parts = [row["instruction"], row.get("input") or ""]
    return {"prompt": "\n".join(part for part in parts if part) + "\n", "completion": row["output"]}


def load_model(args: SFTArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, and inject the adapters unless `args.full`.

    Args:
        args: names the model, the adapters and the precision.

    Returns:
        The model on its training device, in evaluation mode, and the tokenizer.

    Raises:
        ImportError: if a package of the `train` extra is missing.
    """
    require(*TRAIN_PACKAGES)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    import lora_ops

    set_seed(args.seed)  # the adapters' random half
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    if not args.full:
        model = lora_ops.inject(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.targets(),
            quantize=None if args.quantize == "none" else args.quantize,
        )
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    return model.to(device).eval(), tokenizer


def _trl_config(args: SFTArguments) -> Any:
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        optim=args.optim,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_length=args.max_length,
        packing=args.packing,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=args.use_cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        include_num_input_tokens_seen="non_padding",
        report_to=args.report_to,
        disable_tqdm=args.disable_tqdm,
    )


def _optimizer(args: SFTArguments) -> tuple[type, dict[str, Any]] | None:
    """Our AdamW for the names that transformers leaves to bitsandbytes, and for any AdamW in pages; else None."""
    from lora_ops.optim.huggingface import trainer_optimizer

    if not (args.pages() or args.optim in ("adamw_8bit", "adamw_bnb_8bit")):
        return None
    return trainer_optimizer(
        args.optim,
        lr=args.learning_rate,
        page_budget=args.page_budget,
        page_dir=args.page_dir,
        host_budget=args.host_budget,
    )  # betas and eps: transformers' defaults are ours


def train(
    args: SFTArguments,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: TrainerCallback | None = None,
) -> SFTResult:
    """Fine-tune a model with TRL's SFTTrainer and save the adapter in PEFT's format, or the model if `args.full`.

    Args:
        args: what to train, on what, and how.
        model: a model to train, injected unless `args.full`, instead of the one that `args` names; needs `tokenizer`.
        tokenizer: its tokenizer.
        train_dataset: a dataset to train on instead of the one that `args` names.
        callbacks: transformers callbacks to add.
        progress: a callback that shows progress in place of transformers' bar and log lines.

    Returns:
        The result; its `output_dir` holds adapter_config.json and adapter_model.safetensors, or config.json,
        model.safetensors and the tokenizer.

    Raises:
        ValueError: if only one of `model` and `tokenizer` is given, or the dataset cannot be used.
        ImportError: if a package of the `train` extra is missing.
    """
    require(*TRAIN_PACKAGES)
    if (model is None) != (tokenizer is None):
        raise ValueError("model: expected together with tokenizer, got one of the two")
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    data = load_dataset(args.dataset, args.dataset_split) if train_dataset is None else _trl_format(train_dataset)
    if model is None:
        model, tokenizer = load_model(args)
    trainer = SFTTrainer(
        model=model,
        args=_trl_config(args),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=_optimizer(args),
    )
    if progress is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
    start = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=args.checkpoint())
    seconds = time.perf_counter() - start
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    paging = optimizer.paging_stats() if args.pages() else None
    if _optimizer(args) is not None:
        optimizer.close()  # its page_dir is free for the next run
    # Not trainer.save_model: it adds a pickled training_args.bin.
    with replacing_files_in(args.output_dir) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        if args.full:
            trainer.processing_class.save_pretrained(str(folder))
    return SFTResult(
        output_dir=args.output_dir,
        global_step=output.global_step,
        train_loss=output.training_loss,
        tokens=trainer.state.num_input_tokens_seen,
        seconds=seconds,
        log_history=trainer.state.log_history,
        model=model,
        paging=paging,
    )


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train, and say where the adapter is.

    Args:
        argv: command-line arguments; the process's own when None.

    Returns:
        The exit status.
    """
    require(*TRAIN_PACKAGES)
    from transformers import HfArgumentParser

    parser = HfArgumentParser([SFTArguments], prog="python -m lora_ops.trainer.sft", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(args=argv)
        result = train(args)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    if result.paging:
        print(result.paging)
    print(
        f"{result.global_step} steps, mean loss {result.train_loss:.4f}, {result.tokens_per_second:,.0f} tokens/s; "
        f"{'model' if args.full else 'adapter'} in {result.output_dir}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
