"""Siblings of score distillation for editing: a source picture's latents are moved from its prompt to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.diffusion.objective import Schedule
from lit_gen.distillation.contract import Noised, Predictor, Prompts, Score, ScoreDistillation, Step
from lit_gen.distillation.siblings import ASD
from lit_gen.errors import UserError

OriginReal = Literal["edit", "source"]


class DDS(ScoreDistillation):
    """Delta denoising score (arXiv 2304.07090): b is the guided prediction for the source picture under its own
    prompt, at the same timestep and noise.

    `source`, the latents of the source pictures (B ...), is to be set before each step.
    """

    source: Tensor | None = None

    def forward(self, latents: Tensor, prompts: Prompts, step: int = 0) -> Step:
        noised = self.noised(latents, step)
        gradient = self.delta(noised, self.noised_source(noised), prompts)
        return Step(self.inject(latents, gradient, noised.t), logs=self.logs(gradient))

    @torch.no_grad()
    def delta(self, noised: Noised, source: Noised, prompts: Prompts) -> Tensor:
        """e_lam(x; y) - e_lam(src; z), B ...; the source under its own prompt is the last of the teacher's batch."""
        (_, edit), (_, kept) = self.teach((noised, prompts), (source, of_source(prompts)))
        return edit - kept

    def noised_source(self, noised: Noised) -> Noised:
        """The source pictures at the noise of their edits."""
        if self.source is None or len(self.source) != len(noised.clean):
            count = 0 if self.source is None else len(self.source)
            raise UserError(f"{count} source pictures for {len(noised.clean)} edits; there must be one each")
        noisy = self.schedule.add_noise(self.source, noised.noise, noised.t)
        return Noised(self.source, noisy, noised.noise, noised.t)


class CDS(DDS):
    """Contrastive denoising score (arXiv 2311.18608): DDS, and the self-attention features of edit and source are to
    agree place by place (PatchNCE, arXiv 2007.15651), which keeps the layout.

    The only sibling whose gradient goes through the teacher.

    Args:
        teacher, schedule, score: as for ScoreDistillation.
        unet: the teacher's, whose self-attentions are read.
        weight: of the contrastive loss (official code 3.0).
        patches: places compared per layer (256).
        temperature: of the softmax (0.07).
        sizes: sides of the patches that features are averaged over (1 and 2).
    """

    def __init__(
        self,
        teacher: Predictor,
        schedule: Schedule,
        score: Score,
        unet: nn.Module,
        weight: float = 3.0,
        patches: int = 256,
        temperature: float = 0.07,
        sizes: tuple[int, ...] = (1, 2),
    ) -> None:
        super().__init__(teacher, schedule, score)
        self.__dict__["unet"] = unet
        self.weight, self.patches, self.temperature, self.sizes = weight, patches, temperature, sizes

    def forward(self, latents: Tensor, prompts: Prompts, step: int = 0) -> Step:
        noised = self.noised(latents, step)
        source = self.noised_source(noised)
        with self_attentions(self.unet) as seen:
            gradient = self.delta(noised, source, prompts)
        kept = [features[-len(latents) :] for features in seen]  # the source's under its prompt, not the null prompt
        noisy = self.schedule.add_noise(latents, noised.noise, noised.t)  # with gradient
        with self_attentions(self.unet) as moved:
            self.teacher(noisy, noised.t, prompts.target)
        contrast = torch.stack([self.contrast(a, b) for a, b in zip(moved, kept, strict=True)]).mean()
        logs = self.logs(gradient) | {"contrast": contrast.detach()}
        return Step(self.inject(latents, gradient, noised.t) + self.weight * contrast, logs=logs)

    def contrast(self, edit: Tensor, source: Tensor) -> Tensor:
        """PatchNCE of features B N C (N = h h): each place's own source against the other places of the picture."""
        side = round(edit.shape[1] ** 0.5)
        losses = []
        for size in (s for s in self.sizes if s <= side):
            a, b = (F.avg_pool2d(x.transpose(1, 2).unflatten(2, (side, side)), size).flatten(2) for x in (edit, source))
            chosen = torch.randperm(a.shape[2], device=a.device)[: self.patches]
            a, b = (F.normalize(x[:, :, chosen].transpose(1, 2).float(), dim=-1) for x in (a, b))  # B n C
            scores = a @ b.transpose(1, 2) / self.temperature  # B n n
            own = torch.arange(len(chosen), device=a.device).expand(len(a), -1)
            losses.append(F.cross_entropy(scores.flatten(0, 1), own.flatten()))
        return torch.stack(losses).mean()


class DualASD(DDS):
    """ASD for editing (paper Eq. 11): the difference of two discriminators, one of the target and one of the source.

    The gradient is w (e_lam(x; y) - e_phi1(x)) - w (e_lam(src; z) - e_phi2(src)); with both phi at the noise that was
    added it is DDS. The exact losses were not published. Each phi is trained by Eq. 8 and 9 under its own prompt, phi1
    with the edit as the generated and the source as the real sample (card 3.7). For phi2 there are two readings:

    * `origin_real` "edit", ours: the source is its generated sample, the edit the real one. In ASD a discriminator is
      subtracted at the samples that it is trained to know as generated. phi2 is subtracted at the source, so it has to
      know that: where it does without limit, it predicts the added noise there, and the second half is that of DDS.
    * "source", the card's: as for phi1, the source is real and the edit generated. Eq. 8 then drives phi2 away from
      the noise at the very place where it is subtracted.

    Args:
        teacher, schedule, score: as for ScoreDistillation.
        target: ASD with the discriminator of the target prompt.
        origin: ASD with the discriminator of the source prompt.
        origin_real: what the discriminator of the source prompt is shown as real.
    """

    def __init__(
        self,
        teacher: Predictor,
        schedule: Schedule,
        score: Score,
        target: ASD,
        origin: ASD,
        origin_real: OriginReal = "edit",
    ) -> None:
        super().__init__(teacher, schedule, score)
        self.target, self.origin, self.origin_real = target, origin, origin_real

    def forward(self, latents: Tensor, prompts: Prompts, step: int = 0) -> Step:
        noised = self.noised(latents, step)
        source, from_source = self.noised_source(noised), of_source(prompts)
        # One pass of the teacher, and one of each discriminator over edit and source.
        edit, kept, crossed, back = self.teach(
            (noised, prompts), (source, from_source), plain=[(source, prompts.target), (noised, prompts.source)]
        )
        phi1_edit, phi1_source = _both(self.target, noised, source, prompts)
        phi2_edit, phi2_source = _both(self.origin, noised, source, from_source)
        gradient = (edit[1] - phi1_edit.detach()) - (kept[1] - phi2_source.detach())
        generated, real = (phi2_edit, back[0], noised), (phi2_source, kept[0], source)
        if self.origin_real == "edit":
            generated, real = real, generated
        losses = [
            self.target.judge(phi1_edit, edit[0], noised) + self.target.judge_real(phi1_source, crossed[0], source),
            self.origin.judge(*generated) + self.origin.judge_real(*real),
        ]
        pairs = ((phi1_edit.detach(), edit[0]), (phi2_source.detach(), kept[0]))
        distances = [(fake - text).norm() / text.norm().clamp(min=1e-12) for fake, text in pairs]
        logs = self.logs(gradient) | {"discriminator distance": torch.stack(distances).max()}
        return Step(self.inject(latents, gradient, noised.t), torch.stack(losses).sum(), logs)


def _both(player: ASD, noised: Noised, source: Noised, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """A discriminator's predictions for edits and sources, B ... each."""
    index = None if prompts.index is None else torch.cat([prompts.index] * 2)
    twice = Prompts(torch.cat([prompts.target] * 2), torch.cat([prompts.null] * 2), index=index)
    return player.fake(torch.cat([noised.noisy, source.noisy]), torch.cat([noised.t, source.t]), twice).chunk(2)


def of_source(prompts: Prompts) -> Prompts:
    """The prompts of the source pictures, as targets."""
    return Prompts(prompts.source, prompts.null, prompts.source, prompts.index)


@contextmanager
def self_attentions(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs (B N C each) of a UNet's self-attentions, in the order of execution."""
    found: list[Tensor] = []
    layers = [m for name, m in unet.named_modules() if name.endswith(".attn1")]
    hooks = [m.register_forward_hook(lambda _, __, output: found.append(output)) for m in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
