"""Adversarial score distillation (ASD, arXiv 2312.00739) and its siblings: pictures distilled out of a frozen model.

`Particles` moves a set of latents (or pixels) for each prompt until the model, guided by a discriminator that learns
alongside, has nothing left to say about them. No data is needed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.sampling import noise_from
from lit_gen.diffusion.text import encode_text
from lit_gen.distillation.contract import Prompts, Score
from lit_gen.distillation.pictures import DistilledPictures, FrozenDtype
from lit_gen.distillation.players import UNetTeacher, grow_discriminator
from lit_gen.distillation.siblings import ASD, SDS, ClassifierSD
from lit_gen.errors import UserError, at_least
from lit_gen.methods.base import Optimizer, run_seed
from lit_gen.metrics.counterparts import WorldPrompts, judge_prompts
from lit_gen.world.scene import Scenes

Sibling = Literal["asd", "vsd", "sds", "classifier"]


class Particles(DistilledPictures):
    """Text to image: particles of every prompt, all in one batch.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the teacher.
        prompts: texts; by default those of `world`.
        world: prompts of the world, whose truth is known.
        negative: the null prompt of the guidance.
        particles: pictures of each prompt.
        sibling: what is distilled: "asd", "vsd", "sds" or "classifier" (Classifier SD).
        discriminator: of asd and vsd: "lora" on the teacher's UNet, or a learnable text "embedding" of each prompt.
        rank: of the LoRA.
        gamma: of asd, see lit_gen.distillation.siblings.ASD; the paper has -1 in 2D.
        shared: one noising for generator and discriminator.
        discriminator_steps: steps of the discriminator for one of the particles.
        official_v_target: the official code's target for v-predicting bases; for comparison only.
        discriminator_lr: learning rate of the discriminator; `optimizer.lr` is that of the particles. An embedding
            wants ten times what a LoRA does: at 1e-3 it stays where it starts, so that asd and vsd are Classifier SD.
        discriminator_weight_decay: decay of the discriminator towards the teacher; with gamma -1 it gives the
            discriminator's loss a minimum.
        score: guidance, weighting and timesteps.
        space: optimise "latents", or "pixels" through the autoencoder's encoder.
        spread: standard deviation of the particles at the start.
        oracle: folder of the oracle that judges prompts of the world; null for none.
        truths: true pictures of each prompt that colours and variety are compared with.
        frozen_dtype: precision that the teacher's network is kept in. "bfloat16" with `precision: bf16-mixed` saves the
            casts of every pass and memory; what is trained stays float32.
        compile: compile the teacher's network, which is also the discriminator's; null does not.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str = "data/world-base",
        prompts: list[str] | None = None,
        world: WorldPrompts = WorldPrompts(),
        negative: str = "",
        particles: int = 4,
        sibling: Sibling = "asd",
        discriminator: Literal["lora", "embedding"] = "lora",
        rank: int = 4,
        gamma: float = -1.0,
        shared: bool = True,
        discriminator_steps: int = 1,
        official_v_target: bool = False,
        discriminator_lr: float = 1e-4,
        discriminator_weight_decay: float = 0.0,
        score: Score = Score(),
        space: Literal["latents", "pixels"] = "latents",
        spread: float = 1.0,
        oracle: str | None = None,
        truths: int = 256,
        frozen_dtype: FrozenDtype = "float32",
        compile: Compile | None = None,
        optimizer: Optimizer = Optimizer(lr=0.03, weight_decay=0.0, clip_norm=0.0),
    ) -> None:
        at_least(1, particles=particles, discriminator_steps=discriminator_steps, rank=rank, truths=truths)
        if not 0 < spread < float("inf"):
            raise UserError(f"spread is {spread}; it must be above 0")
        super().__init__(base, discriminator_lr, discriminator_weight_decay, oracle, frozen_dtype, optimizer)
        self.space, self.count, self.truths = space, particles, truths
        self.texts, self.scenes = _read(prompts, world)
        self.register_buffer("text", encode_text(self.base.tokenizer, self.base.text_encoder, self.texts), False)
        self.register_buffer("null", encode_text(self.base.tokenizer, self.base.text_encoder, [negative]), False)
        shape = picture_shape(self.base) if space == "pixels" else latent_shape(self.base)
        seeds = [hash_of(run_seed(), p, i) for p in range(len(self.texts)) for i in range(particles)]
        self.latents = nn.Parameter(noise_from(seeds, shape, "cpu") * spread)  # P*N ..., prompt-major
        teacher = UNetTeacher(self.base.unet, self.schedule)
        # After the base is frozen: a discriminator's own parameters are trained.
        if sibling in ("sds", "classifier"):
            self.distillation = {"sds": SDS, "classifier": ClassifierSD}[sibling](teacher, self.schedule, score)
        else:
            self.discriminators = [grow_discriminator(discriminator, self.base.unet, self.schedule, self.text, rank)]
            gamma = 0.0 if sibling == "vsd" else gamma
            self.distillation = ASD(
                *(teacher, self.schedule, score, *self.discriminators, gamma),
                shared=shared,
                official_v_target=official_v_target,
                every=discriminator_steps,
            )
        self.compiled = compile
        if discriminator_steps > 1 and self.discriminators:
            self.refuses_zero = "its optimizer cannot hold the particles while discriminator_steps is above 1"

    def configure_model(self) -> None:
        if self.compiled is not None:
            self.compiled.apply(self.base.unet)

    def on_fit_start(self) -> None:
        if self.compiled is not None:
            self.compiled.refuse_accumulation(self.trainer.accumulate_grad_batches)

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.remember(self.latents[:: self.count])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.compiled is not None and self.compiled.replays_graphs:
            # What the step before left in the graphs' buffers is no longer wanted. Left to itself torch guesses where a
            # step begins, from passes of which here some have a gradient and some do not.
            torch.compiler.cudagraph_mark_step_begin()
        index = batch // self.count
        prompts = Prompts(self.text[index], self.null.expand(len(index), -1, -1), index=index)
        latents = self.as_latents()
        step = self.distillation(latents, prompts, self.global_step)
        self.log_dict({f"train/{name}": value for name, value in step.logs.items()}, batch_size=len(index))
        return step.total

    def as_latents(self) -> Tensor:
        """The particles as latents P*N C h w, with gradient."""
        if self.space == "latents":
            return self.latents
        # The gradient passes straight through the clamp, which would keep a third of a normal start where it is.
        return self.base.encode_mean(self.latents + (self.latents.clamp(-1, 1) - self.latents).detach())

    @torch.no_grad()
    def pictures(self, latents: Tensor | None = None) -> Tensor:
        """The particles, or others, as pictures P*N 3 H W in [-1, 1]."""
        if self.space == "pixels":
            return (self.latents if latents is None else latents).clamp(-1, 1)
        return super().pictures(latents)

    # -- judgement ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pictures = self.pictures()
        if self.scenes is not None:
            self.log_dict(self.judge(pictures), batch_size=len(batch), sync_dist=True)

    def judge(self, pictures: Tensor) -> dict[str, Tensor]:
        """Colours and variety against true pictures of each prompt, and what the oracle reads; means over prompts."""
        found = judge_prompts(pictures, self.scenes.to(self.device), self.truths, self._oracle)
        if (drift := self.drift(pictures)) is not None:
            found["drift"] = drift.unflatten(0, (-1, self.count)).mean(1)
        self.scores.add(numbered(self.texts), **{name.replace(" ", "_"): values for name, values in found.items()})
        return {name: values.mean() for name, values in found.items()}

    def preview(self) -> dict[str, Tensor]:
        """Every particle, and the first of each prompt over time."""
        pictures = self.pictures().cpu()
        size = max(64, pictures.shape[-1])
        shown = [list(row[:8]) for row in pictures.split(self.count)]
        result = {"particles": contact_sheet(shown, rows=self.texts, size=size)}
        if self.strips:
            moments = [self.pictures(latents.to(self.device)).cpu() for latents in self.strips]
            rows = [[moment[p] for moment in moments] for p in range(len(self.texts))]
            result["over time"] = contact_sheet(rows, rows=self.texts, size=size)
        return result

    def subjects(self) -> list[str]:
        return [repr(text) for text in self.texts]

    def name(self, index: int) -> str:
        return f"{index // self.count:02d}-{index % self.count:02d}"


def numbered(texts: list[str]) -> list[str]:
    """Names of samples, which differ also where their texts do not."""
    return [f"{i:02d} {text}" for i, text in enumerate(texts)]


def latent_shape(base: Any) -> tuple[int, ...]:
    """C h w of a base's latents."""
    size = base.unet.config.sample_size
    return (base.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))


def picture_shape(base: Any) -> tuple[int, ...]:
    """3 H W of a base's pictures."""
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    return (3, *(factor * side for side in latent_shape(base)[1:]))


def hash_of(*numbers: int) -> int:
    """A seed for a tuple of small numbers, different from those that steps are seeded with."""
    seed = 17
    for number in numbers:
        seed = seed * 1_000_003 + number + 1
    return seed % 2**31


def _read(prompts: list[str] | None, world: WorldPrompts) -> tuple[list[str], Scenes | None]:
    if prompts is None:
        told, scenes = world.draw()
        return [caption.text for caption in told], scenes
    if not prompts or any(not text.strip() for text in prompts):
        raise UserError("prompts: give at least one text, and none that is empty")
    return list(prompts), None
