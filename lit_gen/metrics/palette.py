"""Do pictures have the colours, and the variety, of true pictures of the same prompts?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 64  # quantiles at which distributions are compared


def palette_error(pictures: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """How far the pixels' colours are from those of true pictures (both B 3 H W in [-1, 1]), in units of the range.

    Returns:
        "palette error": mean distance between the sorted values of red, green, blue and saturation (the Wasserstein-1
        distance of each); "saturation": mean saturation minus the truth's, above 0 for over-saturated pictures.
    """
    distances, ours, theirs = [], _channels(pictures), _channels(truth)
    for a, b in zip(ours, theirs, strict=True):
        distances.append((_quantiles(a) - _quantiles(b)).abs().mean())
    return {"palette error": torch.stack(distances).mean(), "saturation": ours[3].mean() - theirs[3].mean()}


def coverage_error(read: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Total variation distance between the shares of classes among read (N) and true (M) values, -1 left out; 1 where
    nothing was read of either."""
    if not (read >= 0).any() or not (truth >= 0).any():
        return torch.ones((), device=read.device)
    shares = []
    for values in (read, truth):
        counts = torch.bincount(values[values >= 0].flatten(), minlength=classes).float()
        shares.append(counts / counts.sum().clamp(min=1))
    return 0.5 * (shares[0] - shares[1]).abs().sum()


def sliced_distance(pictures: Tensor, truth: Tensor) -> Tensor:
    """Sliced Wasserstein-2 distance between pictures (B 3 H W in [-1, 1]) and true ones (M 3 H W), shrunk to 8 x 8, in
    units of the range; the root mean square over 256 fixed directions of the 192 numbers of a picture."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(192, 256, generator=generator), dim=0).to(pictures.device)
    ours, theirs = (
        torch.nn.functional.adaptive_avg_pool2d((x.float() + 1) / 2, 8).flatten(1) @ directions
        for x in (pictures, truth)
    )
    levels = (torch.arange(256, device=pictures.device) + 0.5) / 256  # of the inverse distribution functions
    ours, theirs = (x.sort(0).values[(levels * len(x)).long()] for x in (ours, theirs))
    return (ours - theirs).square().mean().sqrt()


def _channels(pictures: Tensor) -> Tensor:
    """Red, green, blue and saturation (the span of the three) of every pixel, in 0..1: 4 N."""
    rgb = (pictures.float().clamp(-1, 1) + 1) / 2
    saturation = rgb.amax(1) - rgb.amin(1)
    return torch.cat([rgb.movedim(1, 0).flatten(1), saturation.flatten()[None]])


def _quantiles(values: Tensor) -> Tensor:
    ordered = values.sort().values
    place = torch.linspace(0, len(ordered) - 1, _LEVELS, device=values.device).round().long()
    return ordered[place]
