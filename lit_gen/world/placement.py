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
from lit_gen.world.vocabulary import KINDS, RELATIONS

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
    apart = reach * (1.08 + 0.16 * gap)
    across = {
        "lateral": sign * apart,
        "away": reach * 0.3 * (spread - 0.5),
    }
    depth = {
        "lateral": sign * reach * (0.42 + 0.16 * spread),
        "away": torch.where(relation == FRONT, -1.0, 1.0) * reach * (1.1 + 0.2 * gap),
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


# Every kind as a stack of outlines around its axis, in units of the radius: (z, half width, half depth, is a box).
_OUTLINES = {
    "ball": [(0, 0, 0, 0), (0.29, 0.71, 0.71, 0), (1, 1, 1, 0), (1.71, 0.71, 0.71, 0), (2, 0, 0, 0)],
    "cube": [(0, 0.85, 0.85, 1), (1.7, 0.85, 0.85, 1)],
    "cylinder": [(0, 0.75, 0.75, 0), (1.9, 0.75, 0.75, 0)],
    "cone": [(0, 0.95, 0.95, 0), (2, 0, 0, 0)],
    "ring": [(0, 0, 0.2, 0), (0.29, 0.71, 0.3, 0), (1, 1, 0.32, 0), (1.71, 0.71, 0.3, 0), (2, 0, 0.2, 0)],
    "snowman": [(0, 0, 0, 0), (0.3, 0.55, 0.55, 0), (0.62, 0.64, 0.64, 0), (1.5, 0.47, 0.47, 0), (1.97, 0, 0, 0)],
    "house": [(0, 0.86, 0.7, 1), (1.14, 1.02, 0.69, 1), (1.96, 0.2, 0.69, 1)],
    "mushroom": [(0, 0.42, 0.42, 0), (0.88, 0.95, 0.95, 0), (1.4, 0.75, 0.75, 0), (1.8, 0, 0, 0)],
    "dumbbell": [(0, 0.72, 0, 0), (0.52, 1.24, 0.2, 0), (0.52, 0.72, 0.52, 1), (1.04, 0.72, 0, 0)],
    "rocket": [(0, 0.82, 0.82, 0), (0.6, 0.82, 0.82, 0), (1.45, 0.42, 0.42, 0), (2, 0, 0, 0)],
}


def _outline_points() -> Tensor:
    """Points that span every kind, in its own frame and units of its radius: kinds 40 3."""
    angle = torch.arange(8) * (math.pi / 4)
    circle = torch.stack([angle.cos(), angle.sin()], 1)  # 8 2
    square = circle / circle.abs().amax(1, keepdim=True)
    kinds = []
    for name in KINDS:
        rows = (_OUTLINES[name] * 5)[:5]
        points = [torch.cat([(square if box else circle) * torch.tensor([x, y]), torch.full((8, 1), float(z))], 1)
                  for z, x, y, box in rows]  # fmt: skip
        kinds.append(torch.cat(points))
    return torch.stack(kinds)


_POINTS = _outline_points()


def frame(
    kind: Tensor, radius: Tensor, position: Tensor, yaw: Tensor, look: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """The camera's distance (B, metres) and target (B 3) at which the objects just fill the room, centred.

    look: B 3 3 from `camera_axes`; room: B, the tangent of the angle that the objects may reach from the centre.
    """
    points = _POINTS.to(radius)[kind.clamp(min=0)]  # B K 40 3
    cos, sin = yaw.cos()[..., None], yaw.sin()[..., None]
    x, y, z = points.unbind(3)
    turned = torch.stack([x * cos - y * sin, x * sin + y * cos, z], 3) * radius[..., None, None]
    points = (turned + position[:, :, None]).flatten(1, 2)  # B K*40 3
    hidden = (kind < 0).repeat_interleave(_POINTS.shape[1], dim=1)
    right, up, ahead = ((points * look[:, None, i]).sum(2) for i in range(3))  # B K*40 each
    depth = _middle(ahead, hidden)
    centre_x, centre_y = _middle(right, hidden), _middle(up, hidden)
    reach = torch.maximum((right - centre_x[:, None]).abs(), (up - centre_y[:, None]).abs())
    needed = reach / room[:, None] - (ahead - depth[:, None])
    distance = needed.masked_fill(hidden, -math.inf).amax(1)
    middle = torch.stack([centre_x, centre_y, depth], 1)
    return distance, (middle[..., None] * look).sum(1)


def _middle(values: Tensor, hidden: Tensor) -> Tensor:
    """Half way between the smallest and the largest of each row's shown values: B."""
    low, high = values.masked_fill(hidden, math.inf).amin(1), values.masked_fill(hidden, -math.inf).amax(1)
    return (low + high) / 2


def camera_axes(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors right, up and forward of cameras: B 3 3, axis first."""
    cos, sin, low, high = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    zero = torch.zeros_like(cos)
    right = torch.stack([cos, sin, zero], 1)
    up = torch.stack([-sin * high, cos * high, low], 1)
    forward = torch.stack([-sin * low, cos * low, -high], 1)
    return torch.stack([right, up, forward], 1)
