"""A progress line: step, samples per second, time left, and what the module logs to the bar."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar

from lit_gen.callbacks.record import count


class Progress(ProgressBar):
    """One line that is rewritten on a terminal, and a new line now and then in a log file.

    Args:
        name: what is being run.
        every: seconds between lines where the output is not a terminal.
    """

    def __init__(self, name: str = "fit", every: float = 15.0) -> None:
        super().__init__()
        self.name, self.every = name, every
        self.enabled = True
        self.terminal = sys.stdout.isatty()
        self._rate = 0.0  # samples per second of all processes, smoothed
        self._steps_rate = 0.0
        self._shown = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tick, self._samples, self._step = time.monotonic(), 0, trainer.global_step
        self._end = int(min(trainer.estimated_stepping_batches, 1 << 40))
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        self._print(
            f"{self.name}: {trained:,} of {sum(size for size, _ in sizes):,} parameters are trained", stays=True
        )
        if trainer.global_step:
            self._print(f"{self.name}: continuing at step {trainer.global_step} of {self._end}", stays=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += count(batch) * trainer.world_size
        now = time.monotonic()
        last = trainer.should_stop or trainer.global_step == self._end
        if now - self._shown < (0.2 if self.terminal else self.every) and not last:
            return
        elapsed = max(now - self._tick, 1e-9)
        keep = 0.5 ** (elapsed / 10) if self._rate else 0.0  # the rate forgets half of the past every 10 seconds
        self._rate = keep * self._rate + (1 - keep) * self._samples / elapsed
        self._steps_rate = keep * self._steps_rate + (1 - keep) * (trainer.global_step - self._step) / elapsed
        self._tick, self._samples, self._step, self._shown = now, 0, trainer.global_step, now
        self._print(self._line(trainer, pl_module), stays=last)

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        step = trainer.global_step
        percent = 100 * step / max(self._end, 1)
        parts = [f"{self.name}: step {step}/{self._end} ({percent:.0f} %)", f"{self._rate:.1f} samples/s"]
        if self._steps_rate > 0:
            parts.append(f"left {timedelta(seconds=round((self._end - step) / self._steps_rate))}")
        values = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        return ", ".join(parts + [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.monotonic()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        if time.monotonic() - self._shown >= (0.2 if self.terminal else self.every):
            self._shown = time.monotonic()
            self._print(f"{self.name}: validating, batch {batch_idx + 1}/{batches[dataloader_idx]}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.monotonic()
        if hasattr(self, "_tick"):  # not training time
            self._tick += now - self._validation_began
        names = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("train")}
        told = ", ".join(f"{k} {float(v):.4g}" for k, v in names.items())
        before = " before training" if trainer.sanity_checking else f" at step {trainer.global_step}"
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return
        if trainer.sanity_checking or trainer.global_step:  # `validate` alone gets Lightning's table
            self._print(f"{self.name}: validated{before} in {now - self._validation_began:.0f} s: {told}", stays=True)

    def _print(self, line: str, stays: bool = False) -> None:
        if self.enabled:
            line = f"\r\033[K{line}" if self.terminal else line
            print(line, end="\n" if stays or not self.terminal else "", flush=True)
