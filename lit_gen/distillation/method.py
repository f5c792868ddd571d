"""What methods that distil a frozen model share: how their discriminators are trained, and watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_gen.distillation.contract import ScoreDistillation
from lit_gen.errors import at_least
from lit_gen.methods.base import Method, Optimizer

RUNAWAY = 3.0  # times the teacher's own length that a discriminator may be away from it before we warn


class DistillationMethod(Method):
    """A generator beside discriminators, which may be none.

    A subclass sets `distillation`, and puts the generator's parameters in the optimizer's first group.

    Args:
        discriminator_lr: learning rate of the discriminators; `optimizer.lr` is that of the generator.
        discriminator_weight_decay: decoupled weight decay of the discriminators, towards the teacher.
        optimizer: settings of the optimizer.
    """

    told_in_progress = ("train/gradient",)
    distillation: ScoreDistillation

    def __init__(self, discriminator_lr: float, discriminator_weight_decay: float, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        weight_decay = discriminator_weight_decay
        at_least(0, discriminator_lr=discriminator_lr, discriminator_weight_decay=weight_decay)
        self.discriminator_settings = {"lr": discriminator_lr, "weight_decay": discriminator_weight_decay}
        self.discriminators: list[nn.Module] = []
        self._warned = False

    def discriminator_groups(self) -> list[dict[str, Any]]:
        """The discriminators' group for the optimizer, if there are any."""
        trained = [p for phi in self.discriminators for p in phi.trained()]
        return [{"params": trained, "clip_norm": 1.0, **self.discriminator_settings}] if trained else []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold the generator in the steps that are the discriminators' alone: at a gradient of zero, momentum would
        move it on. By now the gradients have been exchanged between processes, so nothing waits for them."""
        if not self.distillation.moves_generator(self.global_step):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say so once when a discriminator runs away, at the steps that are logged: reading it waits for the device."""
        if self._warned or self.global_step % max(1, self.trainer.log_every_n_steps):
            return
        distance = self.trainer.callback_metrics.get("train/discriminator distance")
        if distance is not None and not float(distance) <= RUNAWAY:  # nor not a number
            self._warned = True
            print(
                f"the discriminator is {float(distance):.1f} times the teacher's length away from it: lower "
                "discriminator_lr, raise discriminator_weight_decay, or take gamma above -1"
            )
