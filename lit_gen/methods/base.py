"""What every method shares: one optimizer, checkpoints without the frozen base, and randomness that resumes exactly."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_gen.errors import UserError, at_least
from lit_gen.weights import read_checkpoint


@dataclass
class Optimizer:
    """AdamW over the trainable parameters.

    Args:
        lr: peak learning rate.
        betas: decay of the first and second moment; 0.99 (torch: 0.999) is ours, for runs of hundreds of steps.
        weight_decay: decoupled weight decay.
        warmup_steps: optimizer steps of linear warm-up from zero.
        schedule: what follows the warm-up; all but constant reach zero at `trainer.max_steps`. A trapezoid stays at
            the peak for three quarters of the steps and falls linearly in the last, so that a run can be given more
            steps, or fewer, long after it started.
        clip_norm: clip the global gradient norm to this value; 0 for no clipping. The default is ours.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = "constant"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        at_least(
            0, lr=self.lr, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, clip_norm=self.clip_norm
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"`betas` must be from 0 to below 1, not {list(self.betas)}")

    def factor(self, step: int, max_steps: int) -> float:
        """Learning rate at `step` as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant" or max_steps <= 0:
            return 1.0
        done = min((step - self.warmup_steps) / max(max_steps - self.warmup_steps, 1), 1.0)
        if self.schedule == "trapezoid":
            return min(1.0, 4 * (1 - step / max_steps))
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Have what was loaded lie in memory as the weights do, as fused kernels want it; it may be another run's."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def run_seed() -> int:
    """The run's `seed_everything`."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class Method(L.LightningModule):
    """Base class of all methods.

    * Checkpoints hold what differs from the frozen base: trainable parameters, the buffers beside them, and whatever an
      earlier stage trained.
    * The random generators are seeded from (seed, rank, batch) before each batch, so a resumed run repeats exactly what
      an uninterrupted one would have drawn.

    Args:
        optimizer: settings of the one optimizer.
    """

    # Why a method cannot run under DeepSpeed, as the second half of a sentence; None if it can.
    refuses_zero: str | None = None
    # What the names begin with of the logged figures that the progress line tells.
    told_in_progress: tuple[str, ...] = ("train/loss",)

    def __init__(self, optimizer: Optimizer = Optimizer()) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.strict_loading = False
        self._inherited: set[str] = set()

    @property
    def run_dir(self) -> Path:
        """Folder of the present run."""
        return Path(self.trainer.default_root_dir)

    # -- optimisation -------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; one of its own settings, or a `clip_norm`, may differ in each."""
        return [{"params": self.trainable_parameters()}]

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.optimizer_settings
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=settings.lr,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )
        optimizer.register_load_state_dict_post_hook(_lay_out_as_weights)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: settings.factor(s, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any
    ) -> None:
        if gradient_clip_val is not None:
            raise UserError("trainer.gradient_clip_val does nothing here; set model.optimizer.clip_norm")
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # its engine clips, over the gradients of all processes
        # Not Lightning's own clipping: it refuses fused optimizers under mixed precision, since under "16-mixed" it
        # leaves it to their step to undo the scale of the gradients, which their norm must not have.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            if (norm := group.get("clip_norm", self.optimizer_settings.clip_norm)) > 0:
                torch.nn.utils.clip_grad_norm_(group["params"], norm)

    # -- randomness ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_step("fit", self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seed_step("validate", batch_idx + 1_000_003 * dataloader_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.on_validation_batch_start(batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seed_step("predict", batch_idx + 1_000_003 * dataloader_idx)

    def seed_step(self, purpose: Literal["fit", "validate", "predict"], step: int) -> None:
        """Seed torch, random and numpy from (seed, purpose, rank, step)."""
        seed = run_seed()
        salt = {"fit": 1, "validate": 2, "predict": 3}[purpose]
        mixed = (seed * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) & (2**64 - 1)
        mixed = (mixed + self.global_rank * 0xD6E8FEB86659FD93) & (2**63 - 1)
        torch.manual_seed(mixed)
        random.seed(mixed)
        np.random.seed(mixed & (2**32 - 1))

    # -- cache --------------------------------------------------------------------------------------------------------

    def cached_parts(self) -> dict[str, Any]:
        """The frozen models and tokenizers that `encode_for_cache` runs, by name; none where nothing can be cached."""
        return {}

    def encode_for_cache(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What a training step computes from a batch with the same result each time: by name, tensors B ....

        Batches of a data module that is `cached` have these instead of the pictures; clips keep theirs. By convention
        "posterior" is what `Base.posterior` gives, B 2 C h w of pictures and B F 2 C h w of clips, "text_states" are
        B L D, and whatever else has a row for each frame of a clip is named "frame_..." (B F ...).
        """
        raise NotImplementedError

    # -- weights ------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights that differ from the frozen base."""
        state = super().state_dict(*args, **kwargs)
        kept = self._kept_names() | self._inherited
        return type(state)((name, value) for name, value in state.items() if name in kept)

    def _kept_names(self) -> set[str]:
        kept: set[str] = set()
        for prefix, module in self.named_modules():
            own = [(n, p) for n, p in module.named_parameters(recurse=False)]
            kept.update(f"{prefix}.{n}" if prefix else n for n, p in own if p.requires_grad)
            if not own or any(p.requires_grad for _, p in own):
                kept.update(f"{prefix}.{n}" if prefix else n for n, _ in module.named_buffers(recurse=False))
        return kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._inherited |= set(checkpoint["state_dict"])

    def load_weights(self, path: str | Path) -> None:
        """Start from another run's checkpoint: averaged weights where it has them, its raw weights otherwise.

        Raises:
            UserError: there is no such checkpoint, or it holds weights this model has no place for.
        """
        checkpoint = read_checkpoint(path)
        weights = {**checkpoint["state_dict"], **checkpoint.get("ema", {})}
        own = super().state_dict()
        wrong = [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]
        if wrong:
            raise UserError(
                f"{path}: {len(wrong)} of {len(weights)} weights do not fit {type(self).__name__}, e.g. {wrong[0]}"
            )
        self.load_state_dict(weights, strict=False)
        self._inherited |= set(weights)
