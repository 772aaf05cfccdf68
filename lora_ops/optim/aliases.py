"""AdamW under the names that users of bitsandbytes know."""

from __future__ import annotations

from typing import Any

from lora_ops.optim.adamw import AdamW

DEFAULT_BUDGET = "2GiB"


class AdamW8bit(AdamW):
    """`AdamW(..., state_bits=8)`: bitsandbytes' AdamW8bit, of which version 0.50.2 differs in this.

    - Codes are the exactly nearest ones, and zero codes to zero. Its CPU code does not: after one gradient in a block,
      a step without gradients moves the 255 other parameters too. Its CUDA code moves an exp_avg whose sign was lost
      in coding to the next code; here it is then zero, or the nearest code, which has its sign.
    - Weight decay comes before the update, as in torch.optim.AdamW and in its CPU code; in its CUDA code it follows.
    - A NaN or inf makes the block of 256 NaN at the next step; there it stays in one element.
    - bfloat16 parameters may be rounded stochastically.
    - Any device, in 32 bits as well; amsgrad and gradients in sparse tensors are refused.
    - `optim_bits` is `state_bits`, also of a group, and `params_32bit` serves for its GlobalOptimManager:
      `params_32bit=lora_ops.optim.embedding_weights(model)`. `min_8bit_size` is 4096.
    - Pages have a byte budget, on the CPU too, and a resumed optimizer is still paged. `is_paged` is managed memory, on
      GPUs alone.
    - State dicts have torch's layout: exp_avg and exp_avg_sq, as codes with exp_avg_absmax and exp_avg_sq_absmax, not
      state1, state2, absmax1, absmax2 and the maps. They are not exchangeable with its own.
    """

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **{"state_bits": 8, **kwargs})


class PagedAdamW(AdamW):
    """`AdamW(..., page_budget="2GiB")`."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **{"page_budget": DEFAULT_BUDGET, **kwargs})


class PagedAdamW8bit(AdamW):
    """`AdamW(..., state_bits=8, page_budget="2GiB")`."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **{"state_bits": 8, "page_budget": DEFAULT_BUDGET, **kwargs})


# By these names PEFT's LoRA+ knows bitsandbytes' classes, and asks for bitsandbytes to give it their embeddings.
AdamW8bit.__name__ = "AdamW_8bit"
PagedAdamW8bit.__name__ = "PagedAdamW_8bit"
