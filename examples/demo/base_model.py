"""Trains the demo's small base model on standard-library source text: `python -m examples.demo.base_model`.

The model sees plain source files of the "base" split only: no instruction, no file of the other two splits. The
result lies in `model/`, so a user never needs to run this; it is here so that anybody can.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.demo.stdlib import library_files, top_module
from lora_ops.trainer._files import replacing_dir, write_json
from lora_ops.trainer._require import require

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DEMO_MODEL = Path(__file__).parent / "model"
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class BaseConfig:
    """What the base model is and how it is trained; the defaults made the shipped one."""

    vocab_size: int = 3072
    hidden_size: int = 192  # three heads of 64; every weight's row is whole 64-value NF4 blocks
    intermediate_size: int = 512
    num_layers: int = 5
    head_dim: int = 64
    max_position_embeddings: int = 512
    sequence_length: int = 256
    batch_size: int = 8  # small batches: the corpus is small, so steps are worth more than large batches
    max_steps: int = 2200
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: the training texts.
        vocab_size: number of tokens, the two special ones and the 256 bytes included.

    Returns:
        The tokenizer. Any text can be encoded, since every byte is a token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Words with their leading space, single digits, runs of spaces as one token: indentation is half of Python.
    words = Regex(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\n+|[ \t]+(?= )|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    import torch

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def _batches(stream: torch.Tensor, config: BaseConfig) -> Iterator[torch.Tensor]:
    """Yield shuffled [batch, length] windows for ever; each epoch cuts the stream at another offset."""
    import torch

    random = torch.Generator().manual_seed(config.seed)
    while True:
        offset = int(torch.randint(config.sequence_length, (1,), generator=random))
        count = (len(stream) - offset) // config.sequence_length
        windows = stream[offset : offset + count * config.sequence_length].view(count, config.sequence_length)
        order = torch.randperm(count, generator=random)
        for start in range(0, count - config.batch_size + 1, config.batch_size):
            yield windows[order[start : start + config.batch_size]]


def new_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make a Llama-architecture model with random weights.

    Args:
        config: its sizes and the seed of its weights.
        tokenizer: gives the vocabulary's size and the special tokens' ids.

    Returns:
        The model in float32, its output head tied to its embedding.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    heads = config.hidden_size // config.head_dim
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _loss(model: LlamaForCausalLM, batch: torch.Tensor, bf16: bool) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=batch, labels=batch).loss


def train_base(
    config: BaseConfig, train_texts: list[str], validation_texts: list[str], *, bf16: bool = False
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train tokenizer and model on plain text with AdamW, warm-up and a cosine.

    Args:
        config: sizes and training numbers.
        train_texts: one text a file.
        validation_texts: texts for the validation loss; never trained on.
        bf16: run matrix products in bfloat16 by autocast (twice as fast where the CPU has avx512_bf16).

    Returns:
        The model, the tokenizer, and a record: token counts, loss curve, validation loss, seconds.

    Raises:
        ValueError: if `train_texts` hold less than one batch.
    """
    import torch
    from tqdm import tqdm

    tokenizer = train_tokenizer(train_texts, config.vocab_size)
    stream = _stream(tokenizer, train_texts)
    if len(stream) < config.sequence_length * (config.batch_size + 1):
        raise ValueError(f"train_texts: expected at least one batch of tokens, got {len(stream)} tokens")
    held = _stream(tokenizer, validation_texts)
    model = new_model(config, tokenizer)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    curve: list[dict[str, float]] = []
    window: list[float] = []
    start = time.perf_counter()
    steps = tqdm(zip(range(config.max_steps), _batches(stream, config), strict=False), total=config.max_steps)
    for step, batch in steps:
        loss = _loss(model, batch, bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        window.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == config.max_steps:
            curve.append({"step": step + 1, "loss": round(sum(window) / len(window), 4)})
            steps.set_postfix(loss=curve[-1]["loss"])
            window.clear()
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        windows = held[: len(held) // config.sequence_length * config.sequence_length].view(-1, config.sequence_length)
        losses = [_loss(model, part, False).item() for part in windows[:256].split(config.batch_size)]
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": len(stream),
        "trained_tokens": config.max_steps * config.batch_size * config.sequence_length,
        "train_loss": curve[-1]["loss"] if curve else None,
        "validation_loss": round(sum(losses) / len(losses), 4) if losses else None,
        "seconds": round(seconds, 1),
        "bf16_autocast": bf16,
        "loss_curve": curve,
    }
    return model, tokenizer, record


_CARD = """\
# demo_model

The base model of `python -m examples.demo`: a Llama-architecture causal language model with
{parameters:,} parameters and its own byte-level BPE tokenizer ({vocab} tokens), made from nothing by
`python -m examples.demo.base_model`. It is a demo's base model; it is useful for nothing else.

* **Text**: {files} source files of CPython {python}'s standard library, the "base" split of
  `examples/demo/stdlib.py` (PSF licence); {corpus_tokens:,} tokens of plain source text. No instruction data, and
  no file of the splits that the demo tunes on ("train") or measures on ("heldout").
* **Training**: {steps} steps of {batch} x {length} tokens, AdamW, peak rate {rate}, cosine, seed {seed};
  {seconds:.0f} s on a CPU. Loss {train_loss:.2f} on the text, {validation_loss:.2f} on files of the "train" split,
  which it did not see.
* **Files**: weights in bfloat16 safetensors; `training.json` holds every setting, the loss curve and the modules.

Load it with `AutoModelForCausalLM.from_pretrained(<this folder>)`; no remote code, no pickle.
"""


def save_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], folder: str | Path
) -> Path:
    """Save a trained base model as the demo ships it: bfloat16 safetensors, tokenizer, record and card.

    Args:
        model: the trained model; it is converted to bfloat16 in place.
        tokenizer: its tokenizer.
        record: as from `main`: config, training figures, modules.
        folder: where to; an older folder is replaced in one step.

    Returns:
        The folder.
    """
    with replacing_dir(folder) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training.json", record)
        config = record["config"]
        card = _CARD.format(
            vocab=len(tokenizer),
            files=record["files"],
            python=record["python"],
            steps=config["max_steps"],
            batch=config["batch_size"],
            length=config["sequence_length"],
            rate=config["learning_rate"],
            seed=config["seed"],
            **{k: record[k] for k in ("parameters", "corpus_tokens", "seconds", "train_loss", "validation_loss")},
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def main(argv: list[str] | None = None) -> int:
    """Train the base model on the running Python's library and save it.

    Args:
        argv: command-line arguments; the process's own when None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.demo.base_model", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=DEMO_MODEL, help="where the model goes (%(default)s)")
    parser.add_argument("--max_steps", type=int, default=BaseConfig.max_steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=BaseConfig.seed, help="seed of weights and order (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster where the CPU has avx512_bf16")
    args = parser.parse_args(argv)
    require("transformers", "tokenizers", "safetensors")

    config = BaseConfig(max_steps=args.max_steps, seed=args.seed)
    files = library_files(split="base")
    validation = [file.text for file in library_files(split="train")]
    model, tokenizer, record = train_base(config, [file.text for file in files], validation, bf16=args.bf16)
    record = {
        "config": asdict(config),
        "python": platform.python_version(),
        "files": len(files),
        "modules": sorted({top_module(file.path) for file in files}),
    } | record
    folder = save_base(model, tokenizer, record, args.output_dir)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {record['parameters']:,} parameters, validation loss {record['validation_loss']}, {size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
