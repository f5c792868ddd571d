"""The siblings of score distillation for generation: SDS, Classifier SD, VSD and ASD; each only what differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.diffusion.objective import Schedule
from lit_gen.distillation.contract import Noised, Predictor, Prompts, Score, ScoreDistillation, Step
from lit_gen.errors import UserError, at_least


class SDS(ScoreDistillation):
    """Score distillation sampling (DreamFusion, arXiv 2209.14988): b is the noise that was added."""

    def baseline(self, noised: Noised, text: Tensor, prompts: Prompts) -> Tensor:
        return noised.noise


class ClassifierSD(ScoreDistillation):
    """Classifier score distillation (arXiv 2310.19415): b = e_y, which leaves (lam - 1) (e_y - e_0)."""

    def baseline(self, noised: Noised, text: Tensor, prompts: Prompts) -> Tensor:
        return text


class ASD(ScoreDistillation):
    """Adversarial score distillation (arXiv 2312.00739): b = e_phi, of a discriminator phi that is trained alongside.

    Without real samples phi minimises  |e_phi(x_g) - eps|^2 + gamma |e_phi(x_g) - e_y(x_g)|^2  (Algorithm 1); with them
    also  - |e_phi(x_r) - eps|^2 + eta |e_y(x_r) - e_phi(x_r)|^2  (Eq. 8, 9). gamma = 0 without real samples is VSD
    (ProlificDreamer, arXiv 2305.16213). An optimal discriminator makes ASD(lam, gamma) the same as VSD with guidance
    1 + (lam - 1)(1 + gamma) and a learning rate divided by 1 + gamma (card 3.6).

    Args:
        teacher, schedule, score: as for ScoreDistillation.
        fake: the discriminator, a trainable noise predictor started from the teacher.
        gamma: in [-1, 0]; the paper has -0.5 in 3D and -1 in 2D, its configs -0.75. At -1 phi has no minimum and
            integrates the difference between samples and teacher: use a small learning rate and clipping.
        eta: weight of the real samples' penalty, 0 or more; used where real samples are given.
        shared: one noising for both players (the paper's algorithm, and a forward pass less); the official code
            draws anew for the discriminator.
        official_v_target: the official code's target of the gamma term for a v-predicting discriminator, which is
            a mixture a^2 e_y + s^2 eps in terms of noise instead of e_y (card 7.2); for comparison only.
        every: generator steps are taken every so many discriminator steps.
    """

    def __init__(
        self,
        teacher: Predictor,
        schedule: Schedule,
        score: Score,
        fake: nn.Module,
        gamma: float = -1.0,
        eta: float = 0.5,
        shared: bool = True,
        official_v_target: bool = False,
        every: int = 1,
    ) -> None:
        super().__init__(teacher, schedule, score)
        if not -1 <= gamma <= 0:
            raise UserError(f"gamma is {gamma}; it must lie in [-1, 0] (below, the discriminator's loss has no bound)")
        if not 0 <= eta < float("inf"):
            raise UserError(f"eta is {eta}; it must be 0 or more (1 bounds the discriminator's loss from below)")
        at_least(1, every=every)
        self.fake, self.gamma, self.eta, self.shared, self.every = fake, gamma, eta, shared, every
        self.official_v_target = official_v_target

    def forward(self, latents: Tensor, prompts: Prompts, step: int = 0, real: Tensor | None = None) -> Step:
        """As ScoreDistillation; the discriminator's loss comes beside the generator's.

        Args:
            real: latents of real pictures of the prompts, B ..., if there are any.
        """
        noised = self.noised(latents, step)
        seen = noised if self.shared else self.noised_anywhere(latents)
        fake = self.fake(seen.noisy, seen.t, prompts)
        generator, logs, text = latents.float().sum() * 0, {}, None  # DDP waits for a gradient of every parameter
        if self.moves_generator(step):
            with torch.no_grad():
                [(text, guided)] = self.teach((noised, prompts))
                gradient = guided - (fake.detach() if self.shared else self.fake(noised.noisy, noised.t, prompts))
            generator, logs = self.inject(latents, gradient, noised.t), self.logs(gradient)
        if self.gamma and (text is None or not self.shared):
            text = self.text(seen, prompts)
        discriminator = self.judge(fake, text, seen)
        if real is not None:
            # At the noise levels of the generated ones: Eq. 8 compares the two.
            true = self.noised(real, step) if self.shared else self.noised_anywhere(real)
            known = self.fake(true.noisy, true.t, prompts)
            discriminator = discriminator + self.judge_real(known, self.text(true, prompts), true)
        if self.gamma:  # grows without end when the discriminator runs away (card 9)
            logs["discriminator distance"] = (fake - text).detach().norm() / text.norm().clamp(min=1e-12)
        return Step(generator, discriminator, logs | {"discriminator loss": discriminator.detach()})

    def moves_generator(self, step: int) -> bool:
        return step % self.every == self.every - 1

    def judge(self, fake: Tensor, text: Tensor | None, noised: Noised) -> Tensor:
        """The discriminator's loss on generated latents: e_phi B ... with gradient, e_y B ... (unused at gamma = 0)."""
        loss = F.mse_loss(fake, noised.noise)
        return loss + self.gamma * F.mse_loss(fake, self._target(text, noised)) if self.gamma else loss

    def judge_real(self, fake: Tensor, text: Tensor, noised: Noised) -> Tensor:
        """The discriminator's loss on real latents: e_phi B ... with gradient, e_y B ...."""
        return self.eta * F.mse_loss(fake, text) - F.mse_loss(fake, noised.noise)

    def noised_anywhere(self, latents: Tensor) -> Noised:
        """At any noise level, as the official code has it for the discriminator."""
        clean, noise = latents.detach(), torch.randn_like(latents)
        t = torch.randint(len(self.schedule), (len(clean),), device=clean.device)
        return Noised(clean, self.schedule.add_noise(clean, noise, t), noise, t)

    def text(self, noised: Noised, prompts: Prompts) -> Tensor:
        """e_y, by a pass of the teacher without the null prompt."""
        return self.ask((noised, prompts.target))[0]

    def _target(self, text: Tensor, noised: Noised) -> Tensor:
        if not self.official_v_target:
            return text
        abar = self.schedule.alphas_cumprod[noised.t].view(-1, *[1] * (text.ndim - 1))
        return abar * text + (1 - abar) * noised.noise


def vsd(teacher: Predictor, schedule: Schedule, score: Score, fake: nn.Module, **options: Any) -> ASD:
    """Variational score distillation (ProlificDreamer, arXiv 2305.16213): ASD with gamma = 0."""
    return ASD(teacher, schedule, score, fake, gamma=0.0, **options)
