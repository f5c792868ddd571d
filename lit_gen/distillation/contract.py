"""What all score distillation shares: noising, guidance, weighting, and handing a gradient to a generator.

Every sibling gives a generator's latents z the gradient  w(t) (e_lam - b)  and differs only in the baseline b, and in
what it trains beside the generator (ASD card, 3.5). One convention of guidance holds everywhere, that of diffusers:
e_lam = e_0 + lam (e_y - e_0), so lam = 1 is no guidance.

Letters: B latents, e_y and e_0 the teacher's noise predictions with the prompt and with the null prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import classifier_free
from lit_gen.errors import UserError

WEIGHTINGS = {
    "sds": lambda abar: 1 - abar,  # DreamFusion; ASD's NeRF configs
    "asd": lambda abar: ((1 - abar) / abar).sqrt(),  # ASD's 3DGS config
    "uniform": torch.ones_like,
    "fantasia3d": lambda abar: abar.sqrt() * (1 - abar),
}
Weighting = Literal["sds", "asd", "uniform", "fantasia3d"]


class Predictor(Protocol):
    """Noise at noisy latents B ..., timesteps B and text states B L D; what a teacher or a discriminator is."""

    def __call__(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor: ...


@dataclass
class Timesteps:
    """Which noise levels are distilled from, as shares of the schedule.

    Args:
        low: least timestep.
        high: greatest timestep at the start.
        end: greatest timestep after annealing; by default it stays.
        anneal_from: step at which annealing begins.
        anneal_to: step at which `end` is reached; the default 0 makes it a jump at `anneal_from` (ProlificDreamer).
    """

    low: float = 0.02
    high: float = 0.98
    end: float | None = None
    anneal_from: int = 0
    anneal_to: int = 0

    def __post_init__(self) -> None:
        for name in ("high", "end"):
            value = getattr(self, name)
            if value is not None and not 0 <= self.low < value <= 1:
                raise UserError(f"timesteps.{name} is {value}; 0 <= low ({self.low}) < {name} <= 1 must hold")

    def highest(self, step: int) -> float:
        """Greatest timestep at a training step, as a share of the schedule."""
        if self.end is None or step < self.anneal_from:
            return self.high
        done = min((step - self.anneal_from) / max(self.anneal_to - self.anneal_from, 1), 1.0)
        return self.high + (self.end - self.high) * (done if self.anneal_to > self.anneal_from else 1.0)

    def sample(self, count: int, total: int, step: int, device: torch.device) -> Tensor:
        """Uniform timesteps [count] of a schedule of `total`."""
        low, high = round(self.low * total), max(round(self.highest(step) * total), round(self.low * total) + 1)
        return torch.randint(low, high, (count,), device=device)


@dataclass
class Prompts:
    """Text states of B latents, all B L D.

    Args:
        target: of what the latents are to show.
        null: of no prompt, or of a negative one.
        source: of what an edited picture showed before.
        index: B, which of the run's prompts each latent belongs to; a discriminator may hold one embedding for each.
    """

    target: Tensor
    null: Tensor
    source: Tensor | None = None
    index: Tensor | None = None


@dataclass
class Noised:
    """Latents at noise level t: noisy = a clean + s noise."""

    clean: Tensor  # B ..., without gradient
    noisy: Tensor  # B ...
    noise: Tensor  # B ...
    t: Tensor  # B


@dataclass
class Step:
    """One step's losses; their sum trains generator and discriminator, which share no gradient path."""

    generator: Tensor
    discriminator: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        return self.generator if self.discriminator is None else self.generator + self.discriminator


@dataclass
class Score:
    """What the teacher is asked, and how its answer is weighted.

    Args:
        guidance: lam of e_lam = e_0 + lam (e_y - e_0); 1 is no guidance.
        weighting: w(t), as a function of abar: "sds" 1 - abar, "asd" sqrt((1 - abar) / abar), "uniform" 1,
            "fantasia3d" sqrt(abar) (1 - abar).
        timesteps: which noise levels.
    """

    guidance: float = 7.5
    weighting: Weighting = "sds"
    timesteps: Timesteps = field(default_factory=Timesteps)

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance is {self.guidance}; it must be 0 or more (1 is no guidance)")


class ScoreDistillation(nn.Module):
    """Base of the family; a sibling says what its baseline is.

    Args:
        teacher: the frozen model, as a noise predictor. Not a part of this module, so never trained or stored with it.
        schedule: its noise schedule.
        score: guidance, weighting and timesteps.
    """

    def __init__(self, teacher: Predictor, schedule: Schedule, score: Score = Score()) -> None:
        super().__init__()
        self.__dict__["teacher"] = teacher  # hidden from parameters() and state_dict()
        self.schedule, self.score = schedule, score

    def forward(self, latents: Tensor, prompts: Prompts, step: int = 0) -> Step:
        """Losses whose gradient with respect to latents (B ...) is w(t) (e_lam - b) / B.

        Args:
            latents: the generator's, with gradient.
            prompts: their text states.
            step: of the training, for annealing.
        """
        noised = self.noised(latents, step)
        with torch.no_grad():
            [(text, guided)] = self.teach((noised, prompts))
            gradient = guided - self.baseline(noised, text, prompts)
        return Step(self.inject(latents, gradient, noised.t), logs=self.logs(gradient))

    def moves_generator(self, step: int) -> bool:
        """Whether a training step is the generator's too; in the others it gets zeros, which are not to be applied."""
        return True

    def baseline(self, noised: Noised, text: Tensor, prompts: Prompts) -> Tensor:
        """b (B ...), without gradient; `text` is e_y, which the teacher has already predicted."""
        raise NotImplementedError

    # -- shared pieces ------------------------------------------------------------------------------------------------

    def noised(self, latents: Tensor, step: int = 0) -> Noised:
        """Latents at random noise levels."""
        clean = latents.detach()
        t = self.score.timesteps.sample(len(clean), len(self.schedule), step, clean.device)
        noise = torch.randn_like(clean)
        return Noised(clean, self.schedule.add_noise(clean, noise, t), noise, t)

    def teach(
        self, *guided: tuple[Noised, Prompts], plain: Sequence[tuple[Noised, Tensor]] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """(e_y, e_lam), both B ..., of each of `guided`, by one pass of the teacher, which needs no null prompt at
        lam = 1; then (e_y, e_y) of each of `plain`: latents, and text states under which no guidance is wanted."""
        lam = self.score.guidance
        if lam == 1:
            found = self.ask(*((noised, prompts.target) for noised, prompts in guided), *plain)
            return [(text, text) for text in found]
        asked = [(noised, text) for noised, prompts in guided for text in (prompts.null, prompts.target)]
        found = self.ask(*asked, *plain)
        both = zip(found[: len(asked) : 2], found[1 : len(asked) : 2], strict=True)
        pairs = [(text, classifier_free(null, text, lam)) for null, text in both]
        return pairs + [(text, text) for text in found[len(asked) :]]

    @torch.no_grad()
    def ask(self, *asked: tuple[Noised, Tensor]) -> list[Tensor]:
        """The teacher's predictions, B ... each, at latents under text states, by one pass."""
        noisy, t = (torch.cat([getattr(noised, name) for noised, _ in asked]) for name in ("noisy", "t"))
        found = self.teacher(noisy, t, torch.cat([text for _, text in asked]))
        return list(found.split([len(noised.t) for noised, _ in asked]))

    def inject(self, latents: Tensor, gradient: Tensor, t: Tensor) -> Tensor:
        """A scalar whose gradient in latents is w(t) gradient / B, in float32; what is not finite is zero."""
        weight = WEIGHTINGS[self.score.weighting](self.schedule.alphas_cumprod[t]).view(-1, *[1] * (latents.ndim - 1))
        wanted = torch.nan_to_num(weight * gradient.float(), nan=0.0, posinf=0.0, neginf=0.0)
        goal = (latents.float() - wanted).detach()
        return 0.5 * (latents.float() - goal).square().sum() / len(latents)

    @staticmethod
    def logs(gradient: Tensor) -> dict[str, Tensor]:
        return {"gradient": gradient.float().square().mean().sqrt()}
