"""AdamW under the names that users of bitsandbytes know."""

from __future__ import annotations

from typing import Any

from lora_ops.optim.adamw import AdamW

DEFAULT_BUDGET = "2GiB"


class AdamW8bit(AdamW):
    """`AdamW(..., state_bits=8)`."""

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
