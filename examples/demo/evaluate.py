"""Loss per item on the completion's tokens only, and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _encode(tokenizer: PreTrainedTokenizerBase, item: dict[str, str], max_length: int) -> tuple[list[int], int]:
    """Tokens of prompt + completion + end, and how many of them are the prompt's: as TRL trains on them."""
    prompt = tokenizer(item["prompt"], add_special_tokens=True)["input_ids"]
    full = tokenizer(item["prompt"] + item["completion"] + (tokenizer.eos_token or ""))["input_ids"]
    return full[:max_length], len(prompt)


def item_losses(
    model: PreTrainedModel | torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, str]],
    *,
    batch_size: int = 16,
    max_length: int = 512,
    progress: str | None = None,
) -> list[float]:
    """Compute each item's mean negative log-likelihood of its completion, the end token included.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        items: dictionaries with prompt and completion.
        batch_size: items at once; batches are of similar lengths.
        max_length: longer sequences are cut.
        progress: a progress bar's text, or None for no bar.

    Returns:
        One loss an item, in the order of `items`, in nats a token.

    Raises:
        ValueError: if a prompt leaves no room for its completion.
    """
    import torch
    from tqdm import tqdm

    encoded = [_encode(tokenizer, item, max_length) for item in items]
    for index, (ids, skip) in enumerate(encoded):
        if len(ids) <= skip:
            raise ValueError(f"items: the prompt of item {index} fills max_length={max_length} tokens")
    order = sorted(range(len(items)), key=lambda i: len(encoded[i][0]))
    device = next(model.parameters()).device
    losses = [0.0] * len(items)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), tqdm(total=len(items), desc=progress, disable=progress is None) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch, mask = _pad([encoded[i][0] for i in part], tokenizer.pad_token_id or 0)
            logits = model(input_ids=batch.to(device), attention_mask=mask.to(device)).logits
            for row, index in enumerate(part):
                tokens, skip = encoded[index]
                answer = torch.tensor(tokens[skip:], device=device)
                scores = logits[row, skip - 1 : len(tokens) - 1].float()  # the token at i is predicted at i - 1
                losses[index] = torch.nn.functional.cross_entropy(scores, answer).item()
            bar.update(len(part))
    model.train(was_training)
    return losses


def _pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, both [items, longest]."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def greedy_answer(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int = 48
) -> str:
    """Let the model answer a prompt, always taking the likeliest token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to go on from.
        max_new_tokens: the answer's greatest length; it ends earlier at the end token.

    Returns:
        The raw answer, special tokens removed.
    """
    import torch

    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))
