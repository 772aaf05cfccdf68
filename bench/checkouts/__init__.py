"""Two checkouts of lora_ops beside each other: the same bits, and no slower; `python -m bench.checkouts OTHER`."""
