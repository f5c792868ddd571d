"""Stopping at a step border when the time is up or a signal asked for it, in a way the next run continues from."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch

from lit_gen import interrupts


class Pause(L.Callback):
    """Ends training early, without validating, so that a checkpoint is written and the run counts as unfinished.

    All ranks stop after the same optimizer step, whichever of them was asked to. Unlike Lightning's timer it counts
    from the start of the command, imports and data building included, and starts anew when a run is resumed.

    Args:
        max_time: wall-clock limit of the whole command; None for none.
        vote_seconds: with several processes, seconds between the votes on whether to stop (a vote costs a collective
            and makes the device catch up); a step that takes longer is followed by a vote each.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None, vote_seconds: float = 2.0) -> None:
        self.limit = None if max_time is None else interrupts.seconds(max_time)
        self.vote_seconds = vote_seconds
        self.status = 0  # exit status that tells the command what became of this stage

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._votes_in = self._between = 1
        self._voted = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # still accumulating gradients, which no checkpoint holds
            return
        self._step = trainer.global_step
        status = interrupts.status(self.limit)
        if trainer.world_size > 1:
            self._votes_in -= 1
            if self._votes_in:
                return
            status = self._vote(trainer, status)
        if status and not self._at_end(trainer):
            self.status, trainer.should_stop = status, True
            trainer.limit_val_batches = 0  # Lightning validates before it stops; the time for that is over
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None  # nor does it heed these

    def _vote(self, trainer: L.Trainer, status: int) -> int:
        """The status on which all ranks stop, or 0; also agreed on, by the slowest, is when to vote again."""
        now = time.monotonic()
        pace = (now - self._voted) / self._between  # seconds per step
        own = torch.tensor([float(status), pace], device=trainer.strategy.root_device)
        agreed, slowest = trainer.strategy.reduce(own, reduce_op="max").tolist()
        self._votes_in = self._between = max(1, min(int(self.vote_seconds / max(slowest, 1e-6)), 1000))
        self._voted = now
        return int(agreed)

    @staticmethod
    def _at_end(trainer: L.Trainer) -> bool:
        return trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps


def take_over_signals(trainer: L.Trainer) -> None:
    """Leave signals to `interrupts` alone.

    Lightning's own handlers save or raise in the middle of a step, and its ranks agree about SIGTERM with a broadcast
    that the device has to catch up with in every step.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
