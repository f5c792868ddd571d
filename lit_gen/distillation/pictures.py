"""A method whose trained weights are the pictures themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_gen.callbacks.samples import save
from lit_gen.data.endless import Endless
from lit_gen.diffusion.base import PIPELINE_PARTS, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.distillation.method import DistillationMethod
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.metrics.scores import Scores

FrozenDtype = Literal["float32", "bfloat16"]
_STRIP = 8  # moments kept for the strips over time
_DRIFT = 100  # steps before the end at which all latents are kept


class DistilledPictures(DistillationMethod):
    """Latents of pictures that a frozen base is distilled into, all of them in every step. No data is needed.

    A subclass sets `latents` (a parameter B ...) and `discriminators`, and says what a step, a validation, `subjects`,
    `name` and `preview` are.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the teacher.
        discriminator_lr: learning rate of the discriminators; `optimizer.lr` is that of the pictures.
        discriminator_weight_decay: of the discriminators.
        oracle: folder of the oracle that judges what is of the world; null for none.
        frozen_dtype: precision that the teacher's network is kept in. "bfloat16" with `precision: bf16-mixed` saves the
            casts of every pass and memory; what is trained stays float32.
        optimizer: settings of the optimizer.
    """

    latents: nn.Parameter

    def __init__(
        self,
        base: str,
        discriminator_lr: float,
        discriminator_weight_decay: float,
        oracle: str | None,
        frozen_dtype: FrozenDtype,
        optimizer: Optimizer,
    ) -> None:
        super().__init__(discriminator_lr, discriminator_weight_decay, optimizer)
        self.base = load_base(base, parts=PIPELINE_PARTS)
        if frozen_dtype == "bfloat16":  # before it gets an adapter
            for weight in self.base.unet.parameters():
                weight.data = weight.data.to(torch.bfloat16)
        self.schedule = Schedule(self.base.scheduler, f"base {self.base.path!r}")
        self._oracle = oracle
        self.scores = Scores()
        self.strips: list[Tensor] = []
        self.late: tuple[int, Tensor] | None = None  # step, and the latents before it
        self._reached = 0  # step of the checkpoint that was loaded

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.latents], "lr": self.optimizer_settings.lr}, *self.discriminator_groups()]

    def train_dataloader(self) -> Endless:
        """Every step is of all pictures."""
        return Endless(100, torch.arange(len(self.latents)))

    def val_dataloader(self) -> DataLoader:
        return DataLoader([torch.arange(len(self.latents))], batch_size=None)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def remember(self, shown: Tensor) -> None:
        """Before a step: keep the latents that strips over time show, at eight moments spread evenly over the run, and
        once all latents, 100 steps before the end (half-way in runs below 200 steps)."""
        total = self.trainer.estimated_stepping_batches  # max_steps, or what epochs amount to; infinite for no end
        if total == float("inf"):
            return
        moments = sorted({total * k // _STRIP for k in range(_STRIP)})
        if len(self.strips) < len(moments) and self.global_step >= moments[len(self.strips)]:
            self.strips.append(shown.detach().clone())
        if self.global_step == total - min(_DRIFT, total // 2):
            self.late = (self.global_step, self.latents.detach().clone())

    def drift(self, pictures: Tensor) -> Tensor | None:
        """How far the pictures (B 3 H W) have moved since the moment that was kept: B, root mean square change of
        their pixels, in units of their range, per 100 steps. None before that moment."""
        steps = max(self.global_step, self._reached) - (self.late[0] if self.late else 0)
        if self.late is None or steps <= 0:
            return None
        moved = (pictures - self.pictures(self.late[1].to(pictures.device))) / 2
        return moved.square().mean((1, 2, 3)).sqrt() * (100 / steps)

    def subjects(self) -> list[str]:
        """What the pictures are of, one line each. Weights that are pictures cannot follow other prompts, so a
        checkpoint is only for the subjects it was trained on."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["strips"], checkpoint["late"], checkpoint["subjects"] = self.strips, self.late, self.subjects()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.subjects()
        refuse_others(checkpoint.get("subjects", own), own)
        super().on_load_checkpoint(checkpoint)
        self.strips, self.late = list(checkpoint.get("strips", [])), checkpoint.get("late")
        self._reached = checkpoint.get("global_step", 0)

    @torch.no_grad()
    def pictures(self, latents: Tensor | None = None) -> Tensor:
        """The pictures B 3 H W in [-1, 1] of latents B ...; by default those that are trained."""
        latents = self.latents if latents is None else latents
        return torch.cat([self.base.decode(part) for part in latents.split(32)])

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)
        self.scores.write(self.run_dir)

    def name(self, index: int) -> str:
        """Of the file of a picture, without its ending."""
        raise NotImplementedError

    def preview(self) -> dict[str, Tensor]:
        """Sheets by name; the first is also what `predict` writes."""
        raise NotImplementedError

    def predict_step(self, batch: Tensor, batch_idx: int) -> Path:
        """Write every picture as a png and all of them as one sheet."""
        folder = self.run_dir / "samples" / "predict"
        for i, picture in enumerate(self.pictures().cpu()):
            save(folder / self.name(i), picture)
        path = save(folder / "contact-sheet", next(iter(self.preview().values())))
        print(f"drawn: {path}")
        return path


def refuse_others(trained: list[str], asked: list[str]) -> None:
    """UserError, where the pictures of a checkpoint are of other subjects than those that are asked for."""
    if trained == asked:
        return
    differ = next((i for i, pair in enumerate(zip(trained, asked, strict=False)) if pair[0] != pair[1]), None)
    if differ is None:
        what = f"{len(trained)} subjects, not {len(asked)}"
    else:
        what = f"{trained[differ]} (number {differ + 1} of {len(trained)}), not {asked[differ]}"
    raise UserError(
        f"the checkpoint's pictures are of {what}: give the settings they were trained with, or train these by `fit` "
        "with another --experiment NAME or with --fresh"
    )
