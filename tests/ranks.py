"""An experiment on real shards that writes down which rank trained on what."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.methods.base import Method

RANKS = """\
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  callbacks:
    - {class_path: lit_gen.callbacks.ema.EMA, init_args: {decay: 0.9}}
model: {class_path: ranks.Grey}
data:
  class_path: lit_gen.data.module.Images
  init_args: {train: numbers, val: numbers, batch_size: 2}
checkpoint: {every_n_steps: 1, keep: 99}
"""


class Grey(Method):
    """Fits a line to the grey values of pictures.

    Args:
        pause: seconds each step sleeps, so that a test can interrupt it.
    """

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        self.net = nn.Linear(1, 1)

    def error(self, batch: dict[str, Any]) -> Tensor:
        grey = batch["image"].mean((1, 2, 3))[:, None]
        return (self.net(grey) - grey + torch.randn_like(grey)).square().mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        with (self.run_dir / f"keys-{self.global_rank}").open("a") as file:
            file.write(f"{self.global_step} {' '.join(key.rpartition('/')[2] for key in batch['key'])}\n")
        (self.run_dir / f"pid-{self.global_rank}").write_text(str(os.getpid()))
        loss = self.error(batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/error", self.error(batch), batch_size=len(batch["key"]), sync_dist=True)

    def on_fit_end(self) -> None:
        torch.save({n: p.data for n, p in self.named_parameters()}, self.run_dir / f"weights-{self.global_rank}")


def trained_on(run: Path, worlds: list[tuple[int, int]]) -> list[str]:
    """Names of the samples of every step, in order, from (first step, number of ranks) of each run."""
    lines: dict[tuple[int, int], list[str]] = {}
    for file in run.glob("keys-*"):
        rank = int(file.name.partition("-")[2])
        for line in file.read_text().splitlines():
            step, *keys = line.split()
            lines[int(step), rank] = keys
    ends = [first for first, _ in worlds[1:]] + [1 + max(step for step, _ in lines)]
    return [
        key
        for (first, world), end in zip(worlds, ends, strict=True)
        for step in range(first, end)
        for rank in range(world)
        for key in lines[step, rank]
    ]
