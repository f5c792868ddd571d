"""Stopping at a step border when the time is up or a signal asked for it, in a way the next run continues from."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_gen import interrupts


class Pause(L.Callback):
    """Ends training early, without validating, so that a checkpoint is written and the run counts as unfinished.

    All ranks stop after the same optimizer step, whichever of them was asked to. Unlike Lightning's timer it counts
    from the start of the command, imports and data building included, and starts anew when a run is resumed.

    Args:
        max_time: wall-clock limit of the whole command; None for none.
        vote_seconds: with several processes, seconds between the votes on whether to stop; a step that takes longer
            is followed by a vote each. What was voted is read a step later, when the device has long come to it, so
            that nothing waits for the device.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None, vote_seconds: float = 2.0) -> None:
        self.limit = None if max_time is None else interrupts.seconds(max_time)
        self.vote_seconds = vote_seconds
        self.status = 0  # exit status that tells the command what became of this stage

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._votes_in = self._between = 1
        self._voted = time.monotonic()
        self._vote: Tensor | None = None  # of the ranks, if it has not been read yet

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # still accumulating gradients, which no checkpoint holds
            return
        self._step = trainer.global_step
        status = interrupts.status(self.limit)
        if trainer.world_size > 1:
            own, status = status, self._read_vote()
            self._votes_in -= 1
            if not self._votes_in:
                self._vote = self._ask(trainer, own)
        if status and not self._at_end(trainer):
            self.status, trainer.should_stop = status, True
            trainer.limit_val_batches = 0  # Lightning validates before it stops; the time for that is over
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None  # nor does it heed these

    def _ask(self, trainer: L.Trainer, status: int) -> Tensor:
        """The highest status of all ranks, and the pace of the slowest in seconds per step; 2, still being reduced."""
        now = time.monotonic()
        own = torch.tensor([float(status), (now - self._voted) / self._between])
        self._voted = now
        device = trainer.strategy.root_device
        if device.type == "cuda":
            own = own.pin_memory().to(device, non_blocking=True)
        torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)  # Lightning's own comes with a barrier
        return own

    def _read_vote(self) -> int:
        """The status on which all ranks stop, or 0; also agreed on is in how many steps to vote again."""
        if self._vote is None:
            return 0
        agreed, slowest = self._vote.tolist()
        self._votes_in = self._between = max(1, min(int(self.vote_seconds / max(slowest, 1e-6)), 1000))
        self._vote = None
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
