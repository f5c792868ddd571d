"""Distillation with real samples (ASD, arXiv 2312.00739, Eq. 8 and 9): a generator that draws in one forward pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.callbacks.samples import contact_sheet, save
from lit_gen.data.facts import scenes_from_facts
from lit_gen.diffusion.base import PIPELINE_PARTS, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import ddim, guided, noise_from
from lit_gen.diffusion.text import encode_text
from lit_gen.distillation.contract import Prompts, Score
from lit_gen.distillation.method import DistillationMethod
from lit_gen.distillation.players import UNetTeacher, grow_discriminator
from lit_gen.distillation.siblings import ASD
from lit_gen.errors import UserError, at_least
from lit_gen.methods.asd import hash_of, latent_shape
from lit_gen.methods.base import Optimizer
from lit_gen.metrics.agreement import compare
from lit_gen.metrics.counterparts import WorldPrompts
from lit_gen.metrics.oracle import bundled
from lit_gen.metrics.palette import palette_error
from lit_gen.metrics.scores import Scores

JUDGED = ("shape", "colour", "pattern")  # by the oracle


class OneStep(DistillationMethod):
    """A copy of the base's network that turns noise into a picture of a caption at once.

    Batches are {"image": B 3 H W, "caption": list of B}, or from a cache {"posterior": B 2 C h w, "text_states":
    B L D}.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint: the teacher, and where the generator starts.
        negative: the null prompt of the guidance.
        noise_level: share of the schedule at which the generator takes pure noise for a noisy picture. At its end a
            network that predicts noise would have its errors multiplied by 1 / sqrt(abar), fifteenfold (ours).
        gamma: see lit_gen.distillation.siblings.ASD.
        eta: weight of the real samples' penalty; below 1 the discriminator's loss has no lower bound.
        rank: of the discriminator's LoRA.
        discriminator_lr: its learning rate; `optimizer.lr` is the generator's.
        discriminator_weight_decay: its decay towards the teacher.
        score: guidance, weighting and timesteps.
        oracle: folder of the oracle, which reads pictures of the world; null for none.
        teacher_steps: DDIM steps of the teacher's pictures that stand beside the generator's in sheets.
        prompts: what `predict` draws; by default six of the world.
        pictures: how many of each.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str = "data/world-base",
        negative: str = "",
        noise_level: float = 0.5,
        gamma: float = -0.5,
        eta: float = 1.0,
        rank: int = 16,
        discriminator_lr: float = 1e-3,
        discriminator_weight_decay: float = 0.0,
        score: Score = Score(guidance=3.0, weighting="uniform"),
        oracle: str | None = None,
        teacher_steps: int = 20,
        prompts: list[str] | None = None,
        pictures: int = 4,
        optimizer: Optimizer = Optimizer(lr=1e-4, weight_decay=0.0, clip_norm=1.0),
    ) -> None:
        at_least(1, pictures=pictures, teacher_steps=teacher_steps, rank=rank)
        super().__init__(discriminator_lr, discriminator_weight_decay, optimizer)
        if not 0 < noise_level < 1:
            raise UserError(f"noise_level is {noise_level}; it must lie between 0 and 1")
        self.base = load_base(base, parts=PIPELINE_PARTS)
        self.schedule = Schedule(self.base.scheduler, f"base {self.base.path!r}")
        self.generator = copy.deepcopy(self.base.unet).requires_grad_(True).train()  # before it gets an adapter
        self.level = round(noise_level * len(self.schedule))
        self._oracle = oracle
        self.teacher_steps, self.guidance = teacher_steps, score.guidance
        self.prompts = prompts or [caption.text for caption in WorldPrompts(6).draw()[0]]
        self.count = pictures
        self.register_buffer("null", self._states([negative]), False)
        fake = grow_discriminator("lora", self.base.unet, self.schedule, self.null, rank)
        self.discriminators = [fake]
        self.distillation = ASD(UNetTeacher(self.base.unet, self.schedule), self.schedule, score, fake, gamma, eta)
        self.scores = Scores()
        self._shown: list[str] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def _states(self, texts: list[str]) -> Tensor:
        return encode_text(self.base.tokenizer, self.base.text_encoder, texts)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.generator.parameters()]}, *self.discriminator_groups()]

    # -- the generator ------------------------------------------------------------------------------------------------

    def generate(self, noise: Tensor, states: Tensor) -> Tensor:
        """Latents B C h w of noise B C h w under text states B L D, by one pass of the network."""
        t = torch.full((len(noise),), self.level, device=noise.device)
        return self.schedule.split(self.generator(noise, t, states).sample.float(), noise, t)[0]

    @torch.no_grad()
    def draw(self, texts: list[str], number: int = 0) -> Tensor:
        """A picture of each text: B 3 H W in [-1, 1]; the number decides the noise."""
        return self._draw(texts, number, self.generate)

    @torch.no_grad()
    def draw_by_teacher(self, texts: list[str], number: int = 0) -> Tensor:
        """The same by the base in `teacher_steps` steps."""
        teacher = self.distillation.teacher

        def sample(noise: Tensor, states: Tensor) -> Tensor:
            denoise = guided(teacher, self.null.expand_as(states), states, self.guidance)
            return ddim(denoise, self.schedule, noise, self.teacher_steps)

        return self._draw(texts, number, sample)

    def _draw(self, texts: list[str], number: int, sample: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        states = self._states(texts).to(self.device)
        noise = noise_from([hash_of(number, i) for i in range(len(texts))], latent_shape(self.base), self.device)
        parts = zip(noise.split(32), states.split(32), strict=True)
        return torch.cat([self.base.decode(sample(*part)) for part in parts])

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if "posterior" in batch:
            real, states = self.base.draw(batch["posterior"]), batch["text_states"].float()
        else:
            real, states = self.base.encode(batch["image"]), self._states(batch["caption"])
        prompts = Prompts(states, self.null.expand(len(states), -1, -1))
        drawn = self.generate(torch.randn_like(real), states)
        step = self.distillation(drawn, prompts, self.global_step, real=real.float())
        self.log_dict({f"train/{name}": value for name, value in step.logs.items()}, batch_size=len(real))
        return step.total

    def cached_parts(self) -> dict[str, Any]:
        return {name: getattr(self.base, name) for name in ("tokenizer", "text_encoder", "vae")}

    @torch.no_grad()
    def encode_for_cache(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"text_states": self._states(batch["caption"]), "posterior": self.base.posterior(batch["image"])}

    # -- judgement ----------------------------------------------------------------------------------------------------

    def predict_dataloader(self) -> DataLoader:
        """One batch: `prompts`."""
        return DataLoader([0], batch_size=None)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        keep = batch.get("valid", torch.ones(len(batch["image"]), dtype=torch.bool)).nonzero()[:, 0].tolist()
        texts, facts, keys = ([batch[name][i] for i in keep] for name in ("caption", "facts", "key"))
        if not keep:  # padding: other processes have the last samples, and all must log the same
            for name in JUDGED if self._oracle else ():
                self.log(name, 0.0, batch_size=0, sync_dist=True)
            return
        drawn = self.draw(texts, batch_idx)
        self._drawn.append((drawn, batch["image"][keep]))
        if batch_idx == 0:
            self._shown = texts[:6]
        if self._oracle:
            reading = bundled(self._oracle).to(self.device).read(drawn)
            agreement = compare(reading, scenes_from_facts(facts).to(self.device))
            for name in JUDGED:
                counted = agreement.counted[name]
                right = (agreement.right[name] & counted).sum(1) / counted.sum(1)  # nan where nothing counts
                self.scores.add(keys, **{name: right})
                right = right[~right.isnan()]
                self.log(name, right.mean() if len(right) else 0.0, batch_size=len(right), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        count = sum(len(drawn) for drawn, _ in self._drawn)
        errors = {"palette error": 0.0, "saturation": 0.0}
        if count:
            errors = palette_error(*(torch.cat(side) for side in zip(*self._drawn, strict=True)))
        self._drawn.clear()
        for name, value in errors.items():
            self._log_mean(name, value, count)
        varied = {"variety": self.draw}
        if self.trainer.testing:  # takes as long as all the rest
            varied["variety of the teacher"] = self.draw_by_teacher
        for name, draw in varied.items():
            self._log_mean(name, self._variety(draw) if self._shown else 0.0, len(self._shown))

    def _log_mean(self, name: str, value: Tensor | float, count: int) -> None:
        """Log a mean over processes, each of which has it of so many samples; there may be none on some."""
        sums = torch.tensor([float(value) * count, float(count)], device=self.device)
        total, number = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.log(name, total / number, sync_dist=True)

    def _variety(self, draw: Callable[[list[str], int], Tensor]) -> Tensor:
        """Root mean square difference between pictures of the same caption from different noise."""
        pictures = torch.stack([draw(self._shown, number) for number in range(4)])
        return torch.stack([(a - b).square().mean().sqrt() for a, b in itertools.combinations(pictures, 2)]).mean()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
        self.scores.write(self.run_dir)

    def preview(self) -> dict[str, Tensor]:
        """Rows of validation captions: pictures of the generator, then of the teacher from the same noise."""
        if not self._shown:
            return {}
        columns = [draw(self._shown, i).cpu() for draw in (self.draw, self.draw_by_teacher) for i in range(4)]
        titles = ["one step", "", "", "", f"{self.teacher_steps} steps", "", "", ""]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return {"pictures": contact_sheet(rows, titles, self._shown, size=max(64, columns[0].shape[-1]))}

    def predict_step(self, batch: int, batch_idx: int) -> Path:
        """Write `pictures` pngs of each prompt and all of them as one sheet."""
        folder = self.run_dir / "samples" / "predict"
        columns = [self.draw(self.prompts, number).cpu() for number in range(self.count)]
        for number, column in enumerate(columns):
            for i, picture in enumerate(column):
                save(folder / f"{i:02d}-{number:02d}", picture)
        rows = [list(row) for row in zip(*columns, strict=True)]
        size = max(64, columns[0].shape[-1])
        path = save(folder / "contact-sheet", contact_sheet(rows, rows=self.prompts, size=size))
        print(f"drawn: {path}")
        return path
