"""Runs the checks of a module on gloo ranks: one process imports everything once and forks the ranks.

`python -m tests.distributed.ranks FOLDER MODULE RANKS` writes FOLDER/NAME for each function check_NAME that has passed
on the first rank; the first failure ends all ranks with its traceback, so that none waits for another.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before the fork, not once in each rank
import torch.multiprocessing as mp


def checks(module: str) -> list[str]:
    return [name for name in vars(importlib.import_module(module)) if name.startswith("check_")]


def work(rank: int, world: int, folder: str, module: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/rendezvous")
    for name in checks(module):
        torch.manual_seed(0)
        getattr(importlib.import_module(module), name)(Path(folder))
        dist.barrier()
        if rank == 0:
            Path(folder, name).touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    target, given, ranks = sys.argv[1:]
    torch.set_num_threads(1)
    importlib.import_module(given)
    mp.start_processes(work, (int(ranks), target, given), nprocs=int(ranks), start_method="fork")
