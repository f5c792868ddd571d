"""The camera that looks at each scene: rays through pixels, and back from points to pixels.

Conventions: see `scene.py`. Pixel (x, y) = (0, 0) is the centre of the upper left pixel, y grows downwards. Depth is
measured along the optical axis (metres), so a point is `position + depth * ray`. Letters: B batch, H W picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.world.scene import Scenes


@dataclass
class Camera:
    """B pinhole cameras with square pixels."""

    position: Tensor  # B 3, metres
    right: Tensor  # B 3, unit
    up: Tensor  # B 3, unit
    forward: Tensor  # B 3, unit
    tangent: Tensor  # B, tangent of half the field of view

    def __getitem__(self, item: slice | Tensor) -> Camera:
        return Camera(*(getattr(self, name)[item] for name in ("position", "right", "up", "forward", "tangent")))

    def rays(self, size: int) -> Tensor:
        """Directions through the centres of size x size pixels, one metre deep: B 3 H W."""
        across = pixel_grid(size, self.position)[None, None, None, :] * self.tangent[:, None, None, None]
        down = pixel_grid(size, self.position)[None, None, :, None] * self.tangent[:, None, None, None]
        forward, right, up = (v[:, :, None, None] for v in (self.forward, self.right, self.up))
        return (forward - down * up) + across * right

    def project(self, points: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel coordinates x, y and depth (each B ...) of points B 3 ...; x and y mean nothing where depth <= 0."""
        extra = (1,) * (points.dim() - 2)
        away = points - self.position.reshape(-1, 3, *extra)
        across, down, depth = (
            (away * axis.reshape(-1, 3, *extra)).sum(1) for axis in (self.right, -self.up, self.forward)
        )
        scale = size / 2 / (depth * self.tangent.reshape(-1, *extra))
        return across * scale + (size - 1) / 2, down * scale + (size - 1) / 2, depth


def pixel_grid(size: int, like: Tensor) -> Tensor:
    """Centres of `size` pixels along one axis as fractions -1..1 of the half picture."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1


def camera_of(scenes: Scenes) -> Camera:
    """The B cameras of B scenes."""
    azimuth, elevation = scenes.azimuth, scenes.elevation
    flat = torch.stack([azimuth.sin(), -azimuth.cos(), torch.zeros_like(azimuth)], 1)
    vertical = torch.tensor([0.0, 0.0, 1.0], device=flat.device)
    outward = flat * elevation.cos()[:, None] + vertical * elevation.sin()[:, None]
    return Camera(
        position=scenes.target + scenes.distance[:, None] * outward,
        right=torch.stack([azimuth.cos(), azimuth.sin(), torch.zeros_like(azimuth)], 1),
        up=vertical * elevation.cos()[:, None] - flat * elevation.sin()[:, None],
        forward=-outward,
        tangent=(scenes.fov / 2).tan(),
    )
