"""What surfaces are painted with: colours, patterns, front details, marks, subject textures and floors.

Colours in here are linear light (the square of the displayed value). Points are given as separate planes (3 Q: x y z).
Letters: Q surface points, W visible object points, E parts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_gen.world.vocabulary import COLOURS, COMPOUNDS, KINDS, PATTERNS


def _linear(*displayed: tuple[float, float, float]) -> Tensor:
    return torch.tensor(displayed) ** 2


PALETTE = _linear(
    (0.88, 0.10, 0.12),  # red
    (1.00, 0.50, 0.05),  # orange
    (0.99, 0.88, 0.12),  # yellow
    (0.10, 0.66, 0.24),  # green
    (0.10, 0.36, 0.92),  # blue
    (0.56, 0.18, 0.76),  # purple
    (0.97, 0.97, 0.97),  # white
    (0.09, 0.09, 0.11),  # black
)
assert len(PALETTE) == len(COLOURS)
# Second colour of patterns and trimmings: cream, but dark on yellow and grey on white and black, whose names hold.
TRIM = _linear(*[(0.98, 0.95, 0.90)] * 2, (0.30, 0.22, 0.16), *[(0.98, 0.95, 0.90)] * 3, *[(0.52, 0.54, 0.58)] * 2)
CREAM = _linear((0.96, 0.90, 0.78))[0]
CARROT = _linear((0.98, 0.52, 0.10))[0]
_PAINT = _linear((0.10, 0.09, 0.10), (0.36, 0.22, 0.13), (0.99, 0.90, 0.55), (0.60, 0.85, 0.97), (0.97, 0.97, 0.95))
_DARK, _BROWN, _GLOW, _GLASS, _PALE = range(5)

# Painted on fronts, in the object's own frame: (part, round?, x, z, half width, half height, paint).
_DETAILS = {
    "snowman": [
        (1, True, -0.18, 1.64, 0.085, 0.085, _DARK),
        (1, True, 0.18, 1.64, 0.085, 0.085, _DARK),
        (0, True, 0, 0.92, 0.09, 0.09, _DARK),
        (0, True, 0, 0.58, 0.09, 0.09, _DARK),
    ],
    "house": [
        (0, False, -0.34, 0.36, 0.2, 0.36, _BROWN),
        (0, False, 0.36, 0.6, 0.24, 0.22, _GLOW),
        (1, True, 0, 1.4, 0.15, 0.15, _GLOW),
    ],
    "mushroom": [
        (1, True, -0.17, 0.56, 0.085, 0.11, _DARK),
        (1, True, 0.17, 0.56, 0.085, 0.11, _DARK),
        (1, False, 0, 0.28, 0.13, 0.05, _DARK),
    ],
    "dumbbell": [(0, True, -0.72, 0.52, 0.3, 0.3, _PALE), (1, True, 0.72, 0.52, 0.3, 0.3, _PALE)],
    "rocket": [(0, True, 0, 1.05, 0.25, 0.25, _DARK), (0, True, 0, 1.05, 0.16, 0.16, _GLASS)],
}
_MOST = max(len(details) for details in _DETAILS.values())
# Where the bullseye of a marked object sits: part, x, z, radius.
_MARKS = torch.tensor(
    [
        (0, 0, 1.0, 0.45),  # ball
        (0, 0, 0.85, 0.48),  # cube
        (0, 0, 0.95, 0.45),  # cylinder
        (0, 0, 0.62, 0.38),  # cone
        (0, 0, 1.68, 0.34),  # ring
        (0, 0, 0.66, 0.34),  # snowman
        (1, 0, 1.42, 0.24),  # house
        (0, 0, 1.3, 0.34),  # mushroom
        (0, -0.72, 0.52, 0.36),  # dumbbell
        (0, 0, 0.95, 0.34),  # rocket
    ]
)
assert len(_MARKS) == len(KINDS)


def _details() -> Tensor:
    table = torch.zeros(len(KINDS), _MOST, 7)
    table[..., 0] = -1  # no such part
    for kind in COMPOUNDS:
        for i, (part, is_round, *place, paint) in enumerate(_DETAILS[kind]):
            table[KINDS.index(kind), i] = torch.tensor([part, float(is_round), *place, paint])
    return table


_DETAIL_TABLE = _details()


def patterned(name: str, p: Tensor, pattern: Tensor) -> Tensor:
    """Where the second colour of a pattern shows: Q bool, for points p (3 Q, unit space) of one primitive.

    Patterns have three to four repeats over an object, coarse enough for a 64-pixel picture.
    """
    x, y, z = p
    striped, checkered, dotted = (PATTERNS.index(word) for word in ("striped", "checkered", "dotted"))
    if name == "cube":
        stripe = _stripe((z + 0.3 * x + 0.15 * y) * 1.7)
        cell = ((p.clamp(-0.999, 0.999) + 1) * 2).floor().sum(0)
        face = p.abs() == p.abs().amax(0)
        dot = ((part_of((p + 1) * 1.5) - 0.5).masked_fill(face, 0) ** 2).sum(0) < 0.3**2
        check = ~_odd(cell)
    elif name == "ring":
        around = torch.atan2(x, z) / (2 * math.pi)
        across = torch.atan2(y, torch.hypot(x, z) - (1 - 0.32)) / (2 * math.pi)
        stripe = _stripe(around * 8)
        check = ~_odd((around * 10).floor() + (across * 4).floor())
        dot = ((part_of(around * 9 + 0.5) - 0.5) * 0.48) ** 2 + ((part_of(across * 2) - 0.5) * 0.9) ** 2 < 0.15**2
    else:
        around = torch.atan2(x, -y) / (2 * math.pi)
        stripe = _stripe((z + 0.3 * x + 0.15 * y) * 1.7)
        if name in ("ball", "dome"):
            rows = torch.asin(z.clamp(-1, 1)) * (5 / math.pi)
            # The twelve corners of an icosahedron, found by symmetry.
            golden = (1 + math.sqrt(5)) / 2
            a, b, c = x.abs(), y.abs(), z.abs()
            near = torch.maximum(torch.maximum(b + golden * c, c + golden * a), a + golden * b)
            dot = near > math.cos(0.34) * math.sqrt(1 + golden**2)
        else:
            rows = (z.clamp(-0.999, 0.999) + 1) * 2  # caps lie on the border of a row
            row = ((z + 1) * 1.5).floor().clamp(0, 2)
            count = 8 - 3 * row if name == "cone" else torch.full_like(row, 8.0)
            girth = (5.0 - 1.7 * row) / count if name == "cone" else 0.6
            offset = part_of(around * count + row / 2) - 0.5
            height = part_of((z + 1) * 1.5) - 0.5
            dot = ((offset * girth) ** 2 + (height * 0.63) ** 2 < 0.19**2) & (z.abs() < 0.999)
        check = ~_odd((around * 8).floor() + rows.floor())
    return ((pattern == striped) & stripe) | ((pattern == checkered) & check) | ((pattern == dotted) & dot)


def _stripe(phase: Tensor) -> Tensor:
    return part_of(phase) < 0.42


def part_of(x: Tensor) -> Tensor:
    """Fractional part, in 0..1 for negative numbers too (`%` is ten times slower on a CPU)."""
    return x - x.floor()


def _odd(count: Tensor) -> Tensor:
    """Which whole numbers are odd."""
    return part_of(count * 0.5) > 0.25


def painted_details(albedo: Tensor, q: Tensor, facing: Tensor, kind: Tensor, part: Tensor, index: Tensor) -> Tensor:
    """Paint eyes, doors and portholes on the fronts of compounds: 3 Q.

    albedo and points q (object's frame) are 3 Q, facing Q says which look to the front; kind and part (E) are those of
    all parts, which index (Q) selects from.
    """
    for row in _DETAIL_TABLE.to(albedo).unbind(1):
        which, is_round, x, z, width, height, colour = row[kind].unbind(1)
        place = torch.where(which == part, width, -1.0)  # a width below zero holds nothing
        table = torch.stack([x, z, place, height, is_round, *_PAINT.to(albedo)[colour.long()].T]).index_select(1, index)
        u, v = (q[0] - table[0]).abs() / table[2], (q[2] - table[1]).abs() / table[3]
        inside = torch.lerp(torch.maximum(u, v), u * u + v * v, table[4]) < 1
        albedo = torch.where(inside & facing & (table[2] > 0), table[5:], albedo)
    return albedo


def painted_mark(albedo: Tensor, q: Tensor, facing: Tensor, kind: Tensor, part: Tensor, index: Tensor) -> Tensor:
    """Paint the bullseye on the fronts of objects, white with a dark rim and centre: 3 Q; arguments as above."""
    which, x, z, radius = _MARKS.to(albedo)[kind].unbind(1)
    table = torch.stack([x, z, torch.where(which == part, 1 / radius, 0)]).index_select(1, index)
    u, v = (q[0] - table[0]) * table[2], (q[2] - table[1]) * table[2]
    distance = u * u + v * v
    paint = _PAINT.to(albedo)[:, :, None]
    colour = torch.where((distance > 0.38**2) & (distance < 0.74**2), paint[_PALE], paint[_DARK])
    return torch.where((distance < 1) & facing & (table[2] > 0), colour, albedo)


def subject_albedo(subject: Tensor, index: Tensor, q: Tensor) -> Tensor:
    """The unique textures of subjects: 3 Q, at points q (3 Q, object's frame) of parts `index` (Q); subject is E ids.

    Two fields of three waves each, cut at levels into two or three colours; waves and colours are drawn from the id.
    """
    u = _uniforms(subject, 32)  # E 32
    waves = []
    for field in range(2):
        direction = u[:, field * 12 : field * 12 + 9].view(-1, 3, 3) * 2 - 1
        length = direction.square().sum(2, keepdim=True).sqrt().clamp(min=0.2)
        pace = 3.6 + 3.0 * u[:, field * 12 + 9 : field * 12 + 12, None]
        waves.append(
            torch.cat([direction / length * pace, 2 * math.pi * u[:, field * 12 + 6 : field * 12 + 9, None]], 2)
        )
    level = []
    for wave in waves:
        table = wave.flatten(1).T.contiguous().index_select(1, index).view(3, 4, -1)
        level.append(sum((k[0] * q[0] + k[1] * q[1] + k[2] * q[2] + k[3]).sin() for k in table))
    first = hue_colour(u[:, 24], 0.95, 0.75)
    second = hue_colour((u[:, 24] + 0.25 + 0.5 * u[:, 25]) % 1, 0.85, 0.6)
    dark = (u[:, 26] < 0.5)[:, None]
    third = torch.where(dark, 0.02 + 0.05 * u[:, 27:30], 0.85 + 0.1 * u[:, 27:30])
    threshold = 0.7 + 0.8 * u[:, 30:31]
    table = torch.cat([first, second, third, threshold], 1).T.contiguous().index_select(1, index)
    albedo = torch.where(level[0] > 0.15, table[3:6], table[:3])
    return torch.where(level[1] > table[9], table[6:9], albedo)


def hue_colour(hue: Tensor, saturation: float, value: float) -> Tensor:
    """Colours (... 3, linear) of hues in 0..1."""
    shift = torch.tensor([0.0, 2 / 3, 1 / 3], device=hue.device, dtype=hue.dtype)
    ramp = (((hue[..., None] + shift) % 1 * 6 - 3).abs() - 1).clamp(0, 1)
    return (value * (1 - saturation + saturation * ramp)).square()


def _uniforms(identity: Tensor, count: int) -> Tensor:
    """`count` numbers in 0..1 per integer, the same on every device: E count."""
    x = identity[:, None] * 0x9E3779B1 + torch.arange(1, count + 1, device=identity.device) * 0x85EBCA77
    for factor in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
        x = x ^ (x >> 15)
    return (x >> 8).float() / 2**24


def floor_albedo(floor: str, x: Tensor, y: Tensor, blur: Tensor) -> Tensor:
    """Colour (3 Q) of the floor at x, y (Q each, metres); blur (Q, metres) is the size of a pixel on the floor."""
    if floor == "grass":
        soft = (x * 3.1 + 1.7 * (y * 1.3).sin()).sin() + (y * 4.3 - x * 1.9 + 1.3 * (x * 2.3).sin()).sin()
        tone = 1 + 0.13 * soft * _fade(blur, 1.5)
        return _mixed((0.36, 0.50, 0.20), tone)
    if floor == "wood":
        plank = x * 1.6
        which = plank.floor()
        along = y * 0.45 + which * 0.37
        tone = 0.86 + 0.28 * part_of(which * 0.618034 + along.floor() * 0.414214) * _fade(blur, 0.6)
        grain = 0.05 * (plank * 19 + (y * 2.1 + which * 2.4).sin() * 1.5).sin() * _fade(blur, 0.2)
        seam = (plank - which - 0.5).abs() > 0.46
        tone = (tone + grain) * (1 - 0.45 * seam * _fade(blur, 0.5))
        return _mixed((0.66, 0.44, 0.26), tone)
    if floor == "stone":
        u, v = x * 1.15, y * 1.15
        i, j = u.floor(), v.floor()
        tone = 0.80 + 0.36 * part_of(i * 0.618034 + j * 0.754878) * _fade(blur, 0.9)
        edge = torch.maximum((u - i - 0.5).abs(), (v - j - 0.5).abs()) > 0.455
        return _mixed((0.56, 0.57, 0.60), tone * (1 - 0.42 * edge * _fade(blur, 0.5)))
    ripple = (y * 9 + 2.2 * (x * 1.1).sin() + 0.8 * (x * 2.9 + y).sin()).sin()
    return _mixed((0.84, 0.75, 0.56), 1 + 0.09 * ripple * _fade(blur, 0.7))


def _fade(blur: Tensor, period: float) -> Tensor:
    """How much of a texture survives when a pixel covers `blur` metres of it: far textures dissolve, not flicker."""
    return (1.3 - blur * (1.6 / period)).clamp(0, 1)


def _mixed(displayed: tuple[float, float, float], tone: Tensor) -> Tensor:
    tone = tone * tone
    return torch.stack([tone * (channel * channel) for channel in displayed])
