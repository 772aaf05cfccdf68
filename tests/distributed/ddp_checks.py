"""QLoRA models under DDP: what each rank checks. Run by test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.nf4_checks import assert_same, qlora
from tests.models import token_ids


def check_ddp(folder: Path) -> None:
    """Gradients are the means over ranks; the ranks' NF4 weights become those of the first one."""
    rank, one = dist.get_rank(), qlora()
    model = nn.parallel.DistributedDataParallel(qlora(seed=rank))
    assert_same(model.module.state_dict(), dict(one.state_dict()))
    ids = [token_ids(seed=seed) for seed in range(dist.get_world_size())]
    for i in ids:
        (one(input_ids=i, labels=i).loss / len(ids)).backward()
    model(input_ids=ids[rank], labels=ids[rank]).loss.backward()
    for (name, p), q in zip(one.named_parameters(), model.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
