"""A progress line: step, speed and what limits it, time left, and what the module logs to the bar."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar

from lit_gen.callbacks.speed import Counts, Speed
from lit_gen.scale.shards import size

RECENT = 20.0  # seconds of training that the speed shown is the average of
READ = 5.0  # seconds between readings of values that lie on a GPU


class Progress(ProgressBar):
    """One line that is rewritten on a terminal, and a new line now and then in a log file.

    It tells the figures whose names begin as in the module's `told_in_progress`, and those logged with `prog_bar=True`.
    The latter are slow on a GPU: Lightning reads them, and so waits for the device, in every step.

    Args:
        name: what is being run.
        every: seconds between lines where the output is not a terminal.
    """

    def __init__(self, name: str = "fit", every: float = 15.0) -> None:
        super().__init__()
        self.name, self.every = name, every
        self.enabled = True
        self.terminal = sys.stdout.isatty()
        self._shown = self._read = 0.0
        self._values: dict[str, Any] = {}

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._speed = next((c for c in trainer.callbacks if isinstance(c, Speed)), None)
        self._recent: deque[Counts] = deque()
        self._end = int(min(trainer.estimated_stepping_batches, 1 << 40))
        sizes = [(size(p), p.requires_grad) for p in pl_module.parameters()]
        trained = sum(count for count, trains in sizes if trains)
        self._print(
            f"{self.name}: {trained:,} of {sum(count for count, _ in sizes):,} parameters are trained", stays=True
        )
        if trainer.global_step:
            self._print(f"{self.name}: continuing at step {trainer.global_step} of {self._end}", stays=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        last = trainer.should_stop or trainer.global_step == self._end
        if now - self._shown < (0.2 if self.terminal else self.every) and not last:
            return
        # Reading a value waits for the GPU to end the step; at every redraw, that would keep it from running ahead.
        if last or trainer.strategy.root_device.type == "cpu" or now - self._read >= READ:
            told = getattr(pl_module, "told_in_progress", ())
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(told)}
            self._values, self._read = values | trainer.progress_bar_metrics, now
        self._shown = now
        self._print(self._line(trainer), stays=last)

    def _line(self, trainer: L.Trainer) -> str:
        step = trainer.global_step
        parts = [f"{self.name}: step {step}/{self._end} ({100 * step / max(self._end, 1):.0f} %)"]
        parts += self._speed_of(trainer, step)
        parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._values.items()]
        return ", ".join(parts)

    def _speed_of(self, trainer: L.Trainer, step: int) -> list[str]:
        """Speed of one process over the last seconds of training, and the time left at that speed."""
        if self._speed is None or self._speed.counts is None:
            return []
        new = self._speed.counts
        self._recent.append(new)
        while len(self._recent) > 2 and self._recent[1].seconds < new.seconds - RECENT:
            self._recent.popleft()
        old = self._recent[0]
        if old.steps == new.steps:
            return []
        figures = self._speed.figures(old, new)
        processes = f" x {trainer.world_size}" if trainer.world_size > 1 else ""
        told = {
            "samples per second": "{:.1f} samples/s" + processes,
            "data wait %": "{:.0f} % waiting for data",
            "MFU %": "{:.0f} % MFU",
            "peak memory GiB": "{:.1f} GiB",
        }
        parts = [text.format(figures[name]) for name, text in told.items() if name in figures]
        seconds = (self._end - step) * (new.seconds - old.seconds) / (new.steps - old.steps)
        return [*parts, f"left {timedelta(seconds=round(seconds))}"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.monotonic()

    # What else goes through batches: nothing is printed of what takes less than a line's time.

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._tell("validating", batch_idx, batches[dataloader_idx])

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._tell("testing", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._tell("predicting", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def _tell(self, doing: str, batch_idx: int, batches: float) -> None:
        """One of `batches` is done; the time left is told from the second on."""
        now = time.monotonic()
        if batch_idx == 0:
            self._first = now
        if now - self._shown < (0.2 if self.terminal else self.every):
            return
        self._shown = now
        line = f"{self.name}: {doing}, batch {batch_idx + 1}/{batches}"
        if batch_idx and batches != float("inf"):
            seconds = (now - self._first) / batch_idx
            line += f", {seconds:.1f} s each, left {timedelta(seconds=round(seconds * (batches - batch_idx - 1)))}"
        self._print(line)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.monotonic()
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
