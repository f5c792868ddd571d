"""Where objects stand and where the camera stands so that all of them are seen.

Works in the camera's ground frame: `lateral` is to the camera's right, `away` from the camera along the floor.
Letters: B scenes, K = 3 object slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_gen.world.draws import Draws
from lit_gen.world.primitives import FOOTPRINT, HEIGHT
from lit_gen.world.vocabulary import RELATIONS

LEFT, RIGHT, BEHIND, FRONT, TOP, NEXT = range(len(RELATIONS))

# What objects 0 and 2 may be to object 1 at once without hiding one another.
TRIPLES = torch.tensor(
    [(LEFT, RIGHT), (RIGHT, LEFT), (LEFT, BEHIND), (RIGHT, BEHIND), (LEFT, FRONT), (RIGHT, FRONT), (BEHIND, LEFT)]
    + [(BEHIND, RIGHT), (FRONT, LEFT), (FRONT, RIGHT), (TOP, LEFT), (TOP, RIGHT), (TOP, LEFT), (TOP, RIGHT)]
)


def place(draws: Draws, kind: Tensor, radius: Tensor, relation: Tensor, azimuth: Tensor) -> Tensor:
    """Positions (B K 3, metres) that make each object's relation to object 1 plain from a camera at `azimuth` (B).

    kind, radius, relation: B K; relation -1 leaves an object at the origin. Neighbours never touch.
    """
    width = FOOTPRINT.to(radius)[kind.clamp(min=0)] * radius  # B K
    reach = width + width[:, 1:2]  # B K, centre distance at which an object would touch object 1
    beside = (relation == LEFT) | (relation == RIGHT)
    sign = torch.where(draws.chance("side", 0.5), 1.0, -1.0)[:, None].repeat(1, 3)  # of objects with a free side
    sign = torch.where(relation == LEFT, -1.0, torch.where(relation == RIGHT, 1.0, sign))
    # An object behind or in front keeps clear of the one at the left or right.
    sign[:, 0] = torch.where(beside[:, 2] & ~beside[:, 0], -sign[:, 2], sign[:, 0])
    sign[:, 2] = torch.where(beside[:, 0] & ~beside[:, 2], -sign[:, 0], sign[:, 2])

    spread, gap = draws.uniforms("spread", 3), draws.uniforms("gap", 3)
    apart = reach * (1.12 + 0.2 * gap)
    across = {
        "lateral": sign * apart,
        "away": reach * 0.3 * (spread - 0.5),
    }
    depth = {
        "lateral": sign * reach * (0.38 + 0.17 * spread),
        "away": torch.where(relation == FRONT, -1.0, 1.0) * reach * (1.15 + 0.25 * gap),
    }
    near = {"lateral": sign * reach * 1.05, "away": reach * 0.4 * (spread - 0.5)}
    in_depth = (relation == BEHIND) | (relation == FRONT)
    lateral = torch.where(in_depth, depth["lateral"], torch.where(relation == NEXT, near["lateral"], across["lateral"]))
    away = torch.where(in_depth, depth["away"], torch.where(relation == NEXT, near["away"], across["away"]))
    alone = (relation < 0) | (relation == TOP)
    lateral, away = lateral.masked_fill(alone, 0), away.masked_fill(alone, 0)
    lift = (HEIGHT.to(radius)[kind.clamp(min=0)] * radius)[:, 1:2] * (relation == TOP)

    cos, sin = azimuth.cos()[:, None], azimuth.sin()[:, None]
    return torch.stack([lateral * cos - away * sin, lateral * sin + away * cos, lift], dim=2)


def frame(
    draws: Draws, kind: Tensor, radius: Tensor, position: Tensor, azimuth: Tensor, elevation: Tensor, tangent: Tensor,
    fill: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The camera's distance (B, metres) and target (B 3) that let the objects fill the fraction `fill` of the picture.

    tangent: B, of half the field of view. The picture is shifted at random within the room that is left.
    """
    present = kind >= 0
    width = FOOTPRINT.to(radius)[kind.clamp(min=0)] * radius
    height = HEIGHT.to(radius)[kind.clamp(min=0)] * radius
    axes = camera_axes(azimuth, elevation)  # B 3 3: right, up, forward
    middle = position.clone()
    middle[..., 2] += height / 2
    seen = torch.stack([(middle * axes[:, None, i]).sum(2) for i in range(3)])  # 3 B K: right, up, forward
    cos, sin = elevation.cos()[:, None], elevation.sin().abs()[:, None]
    half = torch.stack([width, height / 2 * cos + width * sin, height / 2 * sin + width * cos])  # 3 B K
    low = (seen - half).masked_fill(~present, math.inf).amin(2)
    high = (seen + half).masked_fill(~present, -math.inf).amax(2)
    centre = (low + high) / 2  # 3 B
    offset = (seen - centre[:, :, None]).abs() + half
    # Solve |offset| = fill * tangent * depth for the distance; the object's nearer half is what looks largest.
    needed = offset[:2] / (fill * tangent)[:, None] - (seen[2] - centre[2][:, None]) + 0.5 * half[2]  # 2 B K
    distance = needed.masked_fill(~present, -math.inf).amax(0).amax(1)
    jitter = (draws.uniforms("framing", 2) - 0.5) * ((0.92 - fill).clamp(min=0) * distance * tangent)[:, None]
    target = (centre.T[:, :, None] * axes).sum(1) + (jitter[:, :, None] * axes[:, :2]).sum(1)
    return distance, target


def camera_axes(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors right, up and forward of cameras: B 3 3, axis first."""
    cos, sin, low, high = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    zero = torch.zeros_like(cos)
    right = torch.stack([cos, sin, zero], 1)
    up = torch.stack([-sin * high, cos * high, low], 1)
    forward = torch.stack([-sin * low, cos * low, -high], 1)
    return torch.stack([right, up, forward], 1)
