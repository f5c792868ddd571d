"""The diffusion objective: a noise schedule, its targets and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gen.errors import UserError


class Schedule(nn.Module):
    """A discrete variance-preserving noise schedule, z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod`; its prediction type and its timestep spacing are kept.
        of: whose it is, for messages.

    Raises:
        UserError: it predicts neither noise nor velocity.
    """

    alphas_cumprod: Tensor

    def __init__(self, scheduler: Any, of: str = "the base") -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone().float(), persistent=False)
        config = scheduler.config
        self.prediction: Literal["epsilon", "v_prediction"] = config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{of} predicts {self.prediction!r} (`prediction_type` of its scheduler); supported are epsilon and "
                "v_prediction"
            )
        self.spacing: str = config.timestep_spacing
        self.steps_offset: int = config.steps_offset
        self.final_alpha = 1.0 if config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        """Move with the network, but stay float32: in bfloat16 the first noise levels are none, and others are one."""
        exact = self.alphas_cumprod
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps from noisy to clean, spaced as the base's scheduler says."""
        total = len(self)
        if self.spacing == "leading":
            return [i * (total // steps) + self.steps_offset for i in reversed(range(steps))]
        if self.spacing == "trailing":
            return [round(total - i * total / steps) - 1 for i in range(steps)]
        return torch.linspace(0, total - 1, steps, dtype=torch.float32).round().long().flip(0).tolist()

    def sample_timesteps(self, count: int, device: torch.device | str, bias: float = 0.0) -> Tensor:
        """Random timesteps [count] with a density proportional to t ** bias; 0 is uniform."""
        if bias == 0:
            return torch.randint(0, len(self), (count,), device=device)
        t = torch.rand(count, device=device, dtype=torch.float32) ** (1 / (1 + bias)) * len(self)
        return t.long().clamp(max=len(self) - 1)

    def clean_weight(self, t: Tensor) -> Tensor:
        """What turns the squared error of the network's output at timesteps t [B] into that of z_0.

        1 / SNR where the output is eps, here at most 200; 1 - abar where it is v.
        """
        abar = self.alphas_cumprod[t]
        if self.prediction == "v_prediction":
            return 1 - abar
        return 1 / (abar / (1 - abar) + 0.005)

    def _coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, *[1] * (ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t [B ...] from z_0 and eps [B ...] at timesteps t [B]."""
        a, s = self._coefficients(t, clean.ndim)
        return (a * clean + s * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict, [B ...]."""
        if self.prediction == "epsilon":
            return noise
        a, s = self._coefficients(t, clean.ndim)
        return (a * noise - s * clean).to(clean.dtype)

    def split(self, output: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0, eps) that a network output at z_t means, both [B ...]."""
        a, s = self._coefficients(t, noisy.ndim)
        if self.prediction == "epsilon":
            return ((noisy - s * output) / a).to(noisy.dtype), output
        return (a * noisy - s * output).to(noisy.dtype), (a * output + s * noisy).to(noisy.dtype)

    def loss(
        self,
        output: Tensor,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        min_snr: float | None = None,
        lowest_snr: float = 0.0,
    ) -> Tensor:
        """Mean squared error per sample [B], weighted by min(SNR, gamma) if `min_snr` is a gamma (arXiv 2303.09556).

        `lowest_snr` (ours) bounds that weight of the error of z_0 from below. Without it the noisiest steps, where a
        small latent's layout is decided, hardly count.
        """
        error = (output.float() - self.target(clean, noise, t).float()).square().flatten(1).mean(1)
        if min_snr is None:
            return error
        abar = self.alphas_cumprod[t]
        snr = abar / (1 - abar)
        return error * snr.clamp(min=lowest_snr, max=min_snr) / (snr if self.prediction == "epsilon" else snr + 1)
