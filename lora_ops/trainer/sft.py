"""Supervised fine-tuning with LoRA or QLoRA: transformers, TRL and PEFT as they are; lora_ops only through `inject`.

python -m lora_ops.trainer.sft --model_name_or_path ./model --dataset data.jsonl --output_dir out --max_steps 100
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ops.optim import AdamW
from lora_ops.trainer._files import replacing_files_in
from lora_ops.trainer._require import TRAIN_PACKAGES, require
from lora_ops.trainer._say import is_first_process, one_line, warn
from lora_ops.trainer.arguments import SFTArguments
from lora_ops.trainer.checkpoints import WholeCheckpoints, resume_folder
from lora_ops.trainer.choices import check_choices, nearest
from lora_ops.trainer.dataset import load_dataset
from lora_ops.trainer.divergence import DivergedError, StopWhenDiverged
from lora_ops.trainer.figures import RunFigures
from lora_ops.trainer.lengths import CutRows, max_length_for
from lora_ops.trainer.packing import require_isolation
from lora_ops.trainer.rows import to_trl_format
from lora_ops.trainer.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from lora_ops.optim import PagingStats


@dataclass(frozen=True)
class SFTResult:
    """What a training run gave: where the adapter stands, the figures of this run alone, and the trained model.

    After a resume `global_step` and `log_history` count from the first run on; the loss, tokens and seconds do not.
    """

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
        return self.tokens / self.seconds if self.seconds else 0.0


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
    name = args.model_name_or_path
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a dozen kinds, by what the folder or the Hub lacks
        raise ValueError(
            f"model_name_or_path: cannot load {name!r} as a causal language model with its tokenizer "
            f"({one_line(error)}); name a folder with config.json, safetensors weights and a tokenizer, or a Hub model"
        ) from error
    if not args.full:
        model = lora_ops.inject(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.targets(),
            quantize=None if args.quantize == "none" else args.quantize,
            skip_modules=args.skipped(),
        )
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    return model.to(device).eval(), tokenizer


def _trl_config(args: SFTArguments, max_length: int) -> Any:
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
        max_length=max_length,
        packing=args.packing,
        assistant_only_loss=args.assistant_only_loss,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=args.use_cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        logging_nan_inf_filter=False,  # which logs 0 for NaN; `StopWhenDiverged` looks at each loss
        include_num_input_tokens_seen="non_padding",
        report_to=args.report_to,
        disable_tqdm=args.disable_tqdm,
    )


def _optimizer(args: SFTArguments, model: PreTrainedModel) -> tuple[type, dict[str, Any]] | None:
    """Our AdamW for the names that transformers leaves to bitsandbytes, and for any AdamW in pages; else None."""
    from lora_ops.optim.huggingface import trainer_optimizer

    if not (args.pages() or args.optim in ("adamw_8bit", "adamw_bnb_8bit")):
        return None
    return trainer_optimizer(
        args.optim,
        lr=args.learning_rate,
        model=model,
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
        ValueError: if only one of `model` and `tokenizer` is given, or what `args` names cannot be used.
        DivergedError: if the loss, a gradient or a weight is no longer finite; nothing of the run is saved then.
        ImportError: if a package of the `train` extra is missing.
    """
    require(*TRAIN_PACKAGES)
    if (model is None) != (tokenizer is None):
        raise ValueError("model: expected together with tokenizer, got one of the two")
    check_choices(args)
    _warn_slow(args, injected=model is None and not args.full)
    checkpoint = resume_folder(args)
    data = load_dataset(args.dataset, args.dataset_split) if train_dataset is None else to_trl_format(train_dataset)
    if model is None:
        model, tokenizer = load_model(args)
    check_tokenizer(tokenizer, data, assistant_only=args.assistant_only_loss)
    trainer = _trainer(args, model, tokenizer, data, callbacks, progress)
    try:
        output = trainer.train(resume_from_checkpoint=checkpoint)
        figures = trainer.figures()
        trainer.require_finite_state()
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        paging = optimizer.paging_stats() if args.pages() else None
    finally:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if isinstance(optimizer, AdamW):
            optimizer.close()  # its page_dir is free for the next run
    _save(trainer, args)
    return SFTResult(
        output_dir=args.output_dir,
        global_step=output.global_step,
        train_loss=figures.loss,
        tokens=figures.tokens,
        seconds=figures.seconds,
        log_history=trainer.state.log_history,
        model=model,
        paging=paging,
    )


def _warn_slow(args: SFTArguments, *, injected: bool) -> None:
    """Say that bf16 is slow on this CPU, unless `inject` will, which knows what stays in 16 bits."""
    import torch

    from lora_ops.runtime.machine import slow_16bit_reason

    on_cpu = args.use_cpu or not torch.cuda.is_available()
    if args.bf16 and on_cpu and not injected and (reason := slow_16bit_reason()):
        warn(f"bf16: {reason}; leave it out to train in float32")


def _trainer(
    args: SFTArguments, model: Any, tokenizer: Any, data: Dataset, callbacks: Sequence[Any], progress: Any
) -> Any:
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    class Trainer(StopWhenDiverged, WholeCheckpoints, RunFigures, CutRows, SFTTrainer):
        """TRL's trainer, with what must not be silent."""

    trainer = Trainer(
        model=model,
        args=_trl_config(args, max_length_for(model, args.max_length)),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=_optimizer(args, model),
    )
    if args.packing:
        require_isolation(trainer)
    if progress is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
    return trainer


def _save(trainer: Any, args: SFTArguments) -> None:
    """Write the adapter or the model, by one process; the others wait. Without trainer.save_model's pickled file."""
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process holds a part
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with replacing_files_in(args.output_dir) as folder:
            trainer.model.save_pretrained(str(folder), safe_serialization=True, state_dict=state)
            if args.full:
                trainer.processing_class.save_pretrained(str(folder))
    trainer.accelerator.wait_for_everyone()


def _parse(argv: list[str] | None) -> SFTArguments:
    """Read the command line: each name in full, and an error in one line."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            self.exit(2, f"error: {message}\n")

    parser = Parser([SFTArguments], prog="python -m lora_ops.trainer.sft", description=__doc__, allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(
        args=argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [
            option for option in parser._option_string_actions if option.startswith("--") and "-" not in option[2:]
        ]
        raise ValueError(f"{name}: unknown argument; {nearest(name, known)}")
    return args


def _hide_bars() -> None:
    """Loading and tokenizing draw bars of their own, which the Trainer's setting does not reach."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train, and say where the adapter is.

    Args:
        argv: command-line arguments; the process's own when None.

    Returns:
        The exit status.

    Raises:
        SystemExit: with 2 if what was given cannot be used or the run diverged, with 1 for an error of another kind;
            one line says what is wrong, and --traceback where.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        require(*TRAIN_PACKAGES)
        args = _parse(argv)
        if args.disable_tqdm:
            _hide_bars()
        result = train(args)
    except Exception as error:
        if any(option.startswith("--traceback") for option in arguments):
            traceback.print_exc()
        expected = isinstance(error, ValueError | ImportError | DivergedError)
        what = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " (--traceback shows where)"
        print(f"error: {what}{one_line(error)}{hint}", file=sys.stderr)
        raise SystemExit(2 if expected else 1) from None
    if is_first_process():
        if result.paging:
            print(result.paging)
        print(
            f"{result.global_step} steps, mean loss {result.train_loss:.4f}, {result.tokens_per_second:,.0f} tokens/s; "
            f"{'model' if args.full else 'adapter'} in {result.output_dir}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
