"""Mild damage for the oracle's training pictures: what autoencoders, samplers and video codecs do to them.

The oracle never trains on generated pictures; this is what makes it sure-footed on them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _dct(device: torch.device) -> Tensor:
    """Orthonormal 8-point DCT-II: 8 (frequency) x 8 (place)."""
    n = torch.arange(8, device=device, dtype=torch.float32)
    basis = ((2 * n + 1) * n[:, None] * (math.pi / 16)).cos() / 2
    return torch.where(n[:, None] == 0, basis / math.sqrt(2), basis)


def _blur(x: Tensor) -> Tensor:
    """Binomial 3x3 blur of B 3 H W."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4


def _codec(x: Tensor, step: Tensor) -> Tensor:
    """Quantise 8x8 DCT blocks, coarser at high frequencies and in colour, like JPEG and MPEG. step: B 1 1 1."""
    light = x.mean(1, keepdim=True)
    planes = torch.cat([light, F.avg_pool2d(x - light, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)], 1)
    basis, n = _dct(x.device), torch.arange(8, device=x.device)
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).movedim(-3, -2)  # B 4 h w 8 8
    frequency = basis @ blocks @ basis.T
    grain = step[..., None, None] * (1 + (n[:, None] + n) / 4)
    blocks = basis.T @ ((frequency / grain).round() * grain) @ basis
    planes = blocks.movedim(-2, -3).flatten(-2).flatten(-3, -2)
    return planes[:, :1] + planes[:, 1:]


def degrade(images: Tensor, frames: int = 1, strength: float = 1.0) -> Tensor:
    """Randomly damaged copies of images (B 3 H W in [-1, 1]; H and W multiples of 16), from torch's generator.

    A quarter stays clean. With `frames` > 1 the rows are clips of so many frames, and a clip shares its kind of damage;
    only the noise differs from frame to frame.
    """
    b, device = len(images), images.device

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        u = torch.rand(b // frames, channels, 1, 1, device=device).repeat_interleave(frames, 0)
        return low + (high - low) * u

    def sometimes(share: float) -> Tensor:
        return (draw(0, 1) < share).float()

    with torch.autocast(device.type, enabled=False):
        x = images.float()
        x = x * (1 + strength * draw(-0.1, 0.1)) + strength * (draw(-0.05, 0.05) + draw(-0.03, 0.03, 3))
        soft = _blur(x)
        x = x + sometimes(0.6) * strength * draw(-0.25, 1.0) * (soft - x)  # negative: oversharp, as samplers can be
        x = x + sometimes(0.3) * strength * draw(0.0, 1.0) * (_blur(_blur(soft)) - x)
        cloud = torch.randn(b, 3, x.shape[-2] // 8, x.shape[-1] // 8, device=device)
        cloud = F.interpolate(cloud, x.shape[-2:], mode="bilinear")
        x = x + sometimes(0.4) * strength * draw(0.0, 0.06) * cloud
        x = x + sometimes(0.5) * strength * draw(0.0, 0.08) * torch.randn_like(x)
        x = torch.where(sometimes(0.25) > 0, _codec(x, strength * draw(0.02, 0.15) + 1e-3), x)
        return torch.where(sometimes(0.25) > 0, images.float(), x.clamp(-1, 1))
