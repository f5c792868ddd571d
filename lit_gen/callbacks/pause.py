"""Stopping at a step border when the time is up or a signal asked for it, in a way the next run continues from."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as L

from lit_gen import interrupts


class Pause(L.Callback):
    """Ends training early, without validating, so that a checkpoint is written and the run counts as unfinished.

    Unlike Lightning's timer it counts from the start of the command, imports and data building included, and starts
    anew when a run is resumed.

    Args:
        max_time: wall-clock limit of the whole command; None for none.
        every_n_steps: with several processes, steps between the votes on whether to stop (a vote costs a collective).
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None, every_n_steps: int = 10) -> None:
        self.max_time = max_time
        self.every_n_steps = every_n_steps
        self.paused = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        interrupts.install()  # Lightning has put a handler of its own in front, which ends the run within the step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wanted = interrupts.received is not None or interrupts.time_is_up(self.max_time)
        if trainer.world_size > 1:
            if (batch_idx + 1) % self.every_n_steps:
                return
            wanted = trainer.strategy.reduce_boolean_decision(wanted, all=False)
        if wanted and not self._at_end(trainer):
            self.paused = trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning validates before it stops; the time for that is over

    @staticmethod
    def _at_end(trainer: L.Trainer) -> bool:
        return trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
