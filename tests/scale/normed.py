"""Trainings of a small network with a batch norm, in a pair of processes: how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from lit_gen.callbacks.ema import EMA
from lit_gen.scale import zero

RANK, WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # Lightning will forget them


class Normed(L.LightningModule):
    """A small network with a batch norm, which each process shows samples of its own."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        self.validated: list[float] = []
        self.fails = fails

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fails:
            raise ValueError("bad data")
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.net(batch).square().mean().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train_normed(
    folder: Path, strategy: Any, fails: bool = False, ckpt: Path | None = None
) -> tuple[L.Trainer, Normed, DataLoader]:
    """Three steps, the second validated, on the same samples in all processes."""
    module = Normed(fails)
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_steps=3, val_check_interval=2, num_sanity_val_steps=0,
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMA(0.5), Checkpoint(every_n_steps=100)], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip

    def batches(count: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader([torch.randn(4, 3, generator=generator) for _ in range(count)], batch_size=None)

    trainer.fit(module, batches(3, RANK), batches(1, 9), ckpt_path=ckpt)
    return trainer, module, batches(1, 9)


def validated_apart(folder: Path, strategy: Callable[[], Any]) -> dict[str, Any]:
    """What a run that does not end with a validation says when it is validated then, and after it is given again."""
    figures = []
    for ckpt in (None, folder / "checkpoints" / "last.ckpt"):
        trainer, module, validation = train_normed(folder, strategy(), ckpt=ckpt)
        hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
        trainer.validate(module, validation, verbose=False)
        figures.append(module.validated)
    return {"figures": figures, "hooks": hooks}


def interrupted(folder: Path, strategy: Any) -> dict[str, Any]:
    """The error of a training that fails, with what ZeRO-3 then asks of other processes, which may be anywhere."""
    real, zero.unshard = zero.unshard, lambda *_: sys.exit("it waits for the others")
    try:
        train_normed(folder, strategy, fails=True)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        zero.unshard = real
