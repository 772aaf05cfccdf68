"""Kill a paged training with SIGKILL at random moments, in steps and in checkpoints, and resume it, over and over.

A moment is a number of things that the training has told of (a resume, steps, checkpoints) and a little time, so that
kills come in the same places on a busy machine as on a quiet one. After each the last complete checkpoint must be as
late as what was told, load into an optimizer without pages and equal, bit for bit, the uninterrupted run at its step;
the next training resumes from it in the same page_dir.

python -m tests.optim.crash --rounds 200
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lora_ops.optim import AdamW

SIZES = ((300, 130), (5000,), (77,), (64, 65))
MAX_EVENTS = 12
ABOUT_AN_EVENT_S = 0.03


class Training:
    """AdamW on gradients that depend on the step alone."""

    def __init__(self, folder: Path | None, bits: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(size, generator=g)) for size in SIZES]
        pages = {"page_dir": folder / "pages", "page_budget": 3 << 14, "extent_bytes": 1 << 14} if folder else {}
        self.optimizer = AdamW(self.params, lr=1e-2, state_bits=bits, **pages)
        self.steps = 0

    def step(self) -> None:
        g = torch.Generator().manual_seed(1 + self.steps)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=g)
        self.optimizer.step()
        self.steps += 1

    def resume(self, checkpoint: Path) -> None:
        self.optimizer.load_checkpoint(checkpoint)
        self.steps = self.optimizer.state[self.params[0]]["step"]

    def digest(self) -> str:
        h = hashlib.sha256()
        for p in self.params:
            h.update(p.detach().numpy().tobytes())
        for state in self.optimizer.state_dict()["state"].values():
            for t in state.values():
                h.update(t.numpy().tobytes())
        return h.hexdigest()


def train_until_killed(folder: Path, checkpoint: Path, bits: int, told: int) -> None:
    """The child: resume, then step and save without end; a byte into `told` after each of them."""
    training = Training(folder, bits)
    if checkpoint.exists():
        training.resume(checkpoint)
    os.write(told, b"r")
    while True:
        training.step()
        os.write(told, b"s")
        training.optimizer.save_checkpoint(checkpoint, params=True)
        os.write(told, b"c")


def wait_for(events: int, told: int) -> int:
    """Read that many bytes of what the child tells, fewer if it ends; answers how many checkpoints it told of."""
    heard = b""
    while len(heard) < events and (byte := os.read(told, 1)):
        heard += byte
    return heard.count(b"c")


class Uninterrupted:
    """Digests of the run that nobody kills, by step."""

    def __init__(self, bits: int) -> None:
        self._training = Training(None, bits)
        self._digests = [self._training.digest()]

    def digest(self, step: int) -> str:
        while len(self._digests) <= step:
            self._training.step()
            self._digests.append(self._training.digest())
        return self._digests[step]


def kill_and_check(rounds: int, seed: int, bits: int) -> list[int]:
    """Answers the step of the checkpoint after each kill. Raises RuntimeError at the first that is not right."""
    rng, expected, seen = random.Random(seed), Uninterrupted(bits), []
    with tempfile.TemporaryDirectory() as name:
        folder, checkpoint = Path(name), Path(name) / "optimizer.safetensors"
        for number in range(rounds):
            listen, tell = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    train_until_killed(folder, checkpoint, bits, tell)
                finally:
                    os._exit(3)
            os.close(tell)
            saved = wait_for(rng.randrange(MAX_EVENTS), listen)
            time.sleep(rng.uniform(0.0, ABOUT_AN_EVENT_S))
            os.kill(child, signal.SIGKILL)
            os.close(listen)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                raise RuntimeError(f"round {number}: the training failed by itself, see above")
            least = saved + max(seen, default=0)
            if checkpoint.exists():
                loaded = Training(None, bits)
                loaded.resume(checkpoint)
                seen.append(loaded.steps)
                if loaded.digest() != expected.digest(loaded.steps):
                    raise RuntimeError(f"round {number}: the checkpoint is not the state of its step, {loaded.steps}")
            if max(seen, default=0) < least or seen != sorted(seen):
                raise RuntimeError(f"round {number}: step {least} was saved, but the checkpoint is of {seen[-1:]}")
    return seen


def main() -> int:
    """Run for 32 and 8 bits and say how far the training came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked children cannot use OpenMP's threads
    for bits in (32, 8):
        seen = kill_and_check(args.rounds // 2, args.seed, bits)
        kills, last = args.rounds // 2, seen[-1] if seen else 0
        print(f"{bits} bits: {kills} kills, {len(seen)} checkpoints loaded and right, the last of step {last}")
        if not seen:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
