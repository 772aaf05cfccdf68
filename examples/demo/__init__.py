"""The demo (`make demo`): QLoRA from a small base model to better held-out answers, with all that it is made of."""
