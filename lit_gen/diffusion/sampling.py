"""Sampling: one DDIM loop over one contract, and the guidance formulas.

The contract: `denoise(x [B ...], t [B]) -> output [B ...]`, the (guided) network output at noisy latents x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.diffusion.objective import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [B ...], t [B], text states [B ...]) -> [B ...]
NoiseLike = Callable[[Tensor], Tensor]


@torch.no_grad()
def ddim(
    denoise: Denoise,
    schedule: Schedule,
    noise: Tensor,
    steps: int = 50,
    eta: float = 0.0,
    noise_like: NoiseLike = torch.randn_like,
) -> Tensor:
    """Latents [B ...] sampled from `noise` by DDIM (arXiv 2010.02502, Eq. 12).

    Args:
        denoise: the contract above.
        schedule: the base's noise schedule.
        noise: standard normal start, [B ...].
        steps: number of network evaluations.
        eta: 0 deterministic, 1 as noisy as DDPM.
        noise_like: source of the noise that eta > 0 adds.
    """
    x = noise
    abars = schedule.alphas_cumprod.tolist()  # one host copy, no synchronisation inside the loop
    timesteps = schedule.timesteps(steps)
    for i, step in enumerate(timesteps):
        t = torch.full((len(x),), step, device=x.device, dtype=torch.long)
        clean, eps = schedule.split(denoise(x, t), x, t)
        following = _following(schedule, timesteps, i)
        abar, abar_next = abars[step], abars[following] if following >= 0 else schedule.final_alpha
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * clean + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise_like(x)
    return x


def _following(schedule: Schedule, timesteps: list[int], i: int) -> int:
    """Timestep after the i-th; diffusers steps by the nominal stride, which for "leading" ends below 0."""
    if i + 1 < len(timesteps):
        return timesteps[i + 1]
    return timesteps[i] - len(schedule) // len(timesteps)


def classifier_free(null: Tensor, text: Tensor, scale: float) -> Tensor:
    """e(0) + scale [e(c_t) - e(0)]."""
    return null + scale * (text - null)


def guided(predict: Predict, null: Tensor, text: Tensor, scale: float) -> Denoise:
    """Classifier-free guidance, both predictions in one pass; `null` and `text` are text states [B ...]."""
    states = torch.cat([null, text])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return classifier_free(*predict(torch.cat([x, x]), torch.cat([t, t]), states).chunk(2), scale)

    return denoise


def two_scale(null: Tensor, text: Tensor, both: Tensor, text_scale: float, style_scale: float) -> Tensor:
    """e(0) + l_s [e(c_t, c_s) - e(c_t)] + l_t [e(c_t) - e(0)] (StyleCrafter Eq. 2)."""
    return null + style_scale * (both - text) + text_scale * (text - null)


def noise_from(seeds: list[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Standard normal noise [len(seeds) *shape], each sample from its own seed.

    Drawn on the CPU, so that a sample is the same whatever the device, the batch it is in or the number of ranks.
    """
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)
