"""Checkpoints that are whole or absent, and the one a run continues from."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes to the disk, then renames; loads tensors and plain values, never code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location="cpu" if map_location is None else map_location, weights_only=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read to its end. torch's files are zip archives, which carry checksums."""
    if path.is_dir():  # sharded (DeepSpeed): `latest` is written last
        return (path / "latest").is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints/` folder; says so when it passes over a damaged one."""
    numbered = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for path in [folder / "last.ckpt", folder / "previous.ckpt", *numbered]:
        if path.exists():
            if is_whole(path):
                return path
            print(f"{path}: damaged, looking for an earlier one", flush=True)
    return None


class Checkpoint(LightningCheckpoint):
    """Saves `last.ckpt` now and then and at every stop; the one before it stays as `previous.ckpt`.

    Args:
        every_n_steps: optimizer steps between saves.
        keep_every_n_steps: also keep numbered checkpoints this many steps apart; 0 for none.
        keep: how many numbered checkpoints to keep, the newest ones.
    """

    def __init__(self, every_n_steps: int = 200, keep_every_n_steps: int = 0, keep: int = 3) -> None:
        self.every_n_steps, self.keep_every_n_steps, self.keep = every_n_steps, keep_every_n_steps, keep
        self.saved_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero:
            for left_over in self.folder.glob(".*.tmp"):  # of a run killed while saving
                left_over.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = trainer.global_step

    # Lightning calls checkpoint callbacks last, so the others' state (averages, counts, pauses) is that of this step.
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.saved_step:  # still accumulating gradients
            return
        numbered = self.keep_every_n_steps > 0 and step % self.keep_every_n_steps == 0
        ending = trainer.should_stop or step == trainer.max_steps
        if step % self.every_n_steps == 0 or numbered or ending:
            self.save(trainer, numbered)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:  # max_epochs reached
            self.save(trainer)

    def save(self, trainer: L.Trainer, numbered: bool = False) -> None:
        """Write `last.ckpt`; every rank must call this."""
        self.saved_step = trainer.global_step
        new, last = self.folder / "new.ckpt", self.folder / "last.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            previous = self.folder / "previous.ckpt"
            if last.is_dir():
                shutil.rmtree(previous, ignore_errors=True)
            if last.exists():
                last.replace(previous)
            new.replace(last)
            if numbered:
                self._keep(last, self.folder / f"step-{self.saved_step:08d}.ckpt")
        trainer.strategy.barrier("checkpoint")

    def _keep(self, last: Path, path: Path) -> None:
        if last.is_dir():
            shutil.copytree(last, path, dirs_exist_ok=True)
        else:
            shutil.copyfile(last, path)
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep or None]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
