"""Light: sun, moon and fog, soft shadows, contact shadows, skies.

Colours are linear light. Directions are world directions, the same for every camera, so that views of one scene agree.
Letters: B batch, Q surface points, E parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_gen.world.primitives import TUBE
from lit_gen.world.vocabulary import TIMES

SUN_SPREAD = 0.07  # half angle (tangent) of the light: how fast shadows soften with distance
CONTACT_REACH = 2.0  # contact shadows end at this many radii from a part's centre


@dataclass
class Light:
    """Light of B scenes."""

    direction: Tensor  # B 3, unit, towards the sun or moon
    sun: Tensor  # B 3
    sky: Tensor  # B 3, light from above
    ground: Tensor  # B 3, light from below
    horizon: Tensor  # B 3, colour of the sky at the horizon and of all that is far away
    zenith: Tensor  # B 3
    fog: Tensor  # B, per metre
    backdrop: Tensor  # B 3, what backdrop colours are multiplied with
    glow: Tensor  # B, strength of the sky's glow around the sun or moon

    def __getitem__(self, item: Tensor) -> Light:
        return Light(*(getattr(self, f.name)[item] for f in fields(self)))


_LIGHTS = {  # direction, sun, sky, ground, horizon, zenith, fog, backdrop, glow
    "day": (
        (-0.52, -0.55, 0.80),
        (0.86, 0.81, 0.73),
        (0.46, 0.48, 0.52),
        (0.30, 0.28, 0.26),
        (0.72, 0.84, 0.94),
        (0.16, 0.42, 0.86),
        0.006,
        (1.0, 1.0, 1.0),
        0.25,
    ),
    "night": (
        (0.48, -0.55, 0.68),
        (0.26, 0.28, 0.38),
        (0.090, 0.105, 0.165),
        (0.060, 0.065, 0.090),
        (0.040, 0.060, 0.15),
        (0.006, 0.010, 0.040),
        0.010,
        (0.18, 0.20, 0.29),
        0.5,
    ),
    "fog": (
        (-0.20, -0.30, 0.93),
        (0.30, 0.30, 0.30),
        (0.58, 0.59, 0.60),
        (0.30, 0.30, 0.30),
        (0.66, 0.68, 0.70),
        (0.56, 0.59, 0.63),
        0.095,
        (0.85, 0.86, 0.87),
        0.0,
    ),
}


def light_of(time: Tensor) -> Light:
    """The light at each of B times (into TIMES)."""
    columns = zip(*(_LIGHTS[name] for name in TIMES), strict=True)
    light = Light(*(torch.tensor(column, device=time.device)[time] for column in columns))
    light.direction = light.direction / light.direction.square().sum(1, keepdim=True).sqrt()
    return light


def shade(
    albedo: Tensor, normal: Tensor, view: Tensor, light: Tensor, shadow: Tensor, open_sky: Tensor
) -> tuple[Tensor, Tensor]:
    """Colour (3 Q) and brightness of the light (Q, about 0..1) of surface points.

    albedo, normal and view (towards the eye, any length) are 3 Q; light is direction, sun, sky and ground as 4 3 Q;
    shadow and open_sky (Q, 0..1) say how much of the sun and of the sky a point sees.
    """
    direction, sun, sky, ground = light
    facing = (normal * direction).sum(0)
    # A little light wraps around the terminator, so that round things stay round in the shade.
    lit = ((facing + 0.12) / 1.12).clamp(min=0) * shadow
    half = direction + view / view.square().sum(0).sqrt()
    spark = (normal * half).sum(0).clamp(min=0) / half.square().sum(0).sqrt().clamp(min=1e-6)
    for _ in range(5):  # to the 32nd power
        spark = spark * spark
    ambient = torch.lerp(ground, sky, 0.5 + 0.5 * normal[2]) + sky * (0.06 - 0.06 * facing)
    irradiance = sun * lit + ambient * open_sky
    colour = albedo * irradiance + sun * (0.22 * spark * shadow * (facing > 0))
    return colour, irradiance.sum(0) / (sun + sky).sum(0)


def sky_colour(ray: Tensor, light: Light) -> Tensor:
    """Colour of the open sky along rays (3 B Q, unit length) of B scenes: 3 B Q."""
    low = 1 - ray[2].clamp(0, 1)
    direction, horizon, zenith = (v.T[:, :, None] for v in (light.direction, light.horizon, light.zenith))
    near = (ray * direction).sum(0).clamp(min=0)
    return torch.lerp(zenith, horizon, low * low * low) + horizon * (near * near * near * light.glow[:, None])


def occlusion(name: str, origin: Tensor, ray: Tensor) -> Tensor:
    """How much of the sun a primitive hides, 0..1 (Q), from points origin (3 Q) whose light comes along ray (3 Q).

    Both in the primitive's unit space, ray one metre long. The gap between the ray and the surface at their nearest is
    compared with the width of the light there, so that shadows soften with distance.
    """
    ox, oy, oz = origin
    dx, dy, dz = ray
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    if name in ("ball", "dome"):
        if name == "dome":  # an ellipsoid in the middle of the half ball
            oz, dz = (oz - 0.42) / 0.56, dz / 0.56
        t = -(ox * dx + oy * dy + oz * dz) / (dx * dx + dy * dy + dz * dz)
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        gap = (x * x + y * y + z * z).sqrt() - 1
    elif name == "cube":
        near, far = _interval(ox, dx)
        for o, d in ((oy, dy), (oz, dz)):
            low, high = _interval(o, d)
            near, far = torch.maximum(near, low), torch.minimum(far, high)
        t = (near + far) / 2
        gap = (near - far) * length * 0.5
    elif name in ("cylinder", "cone"):
        low, high = _interval(oz, dz)
        flat = (dx * dx + dy * dy).clamp(min=1e-9)
        t = -(ox * dx + oy * dy) / flat
        x, y = ox + t * dx, oy + t * dy
        miss = x * x + y * y
        if name == "cone":  # the ray is nearest to the sloping side where its distance grows as fast as the cone does
            slope = dz / 2
            t = t - slope * (miss / (flat * (flat - slope * slope).clamp(min=1e-6))).sqrt()
        t = torch.maximum(torch.minimum(t, high), low)
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        gap = (x * x + y * y).sqrt() - 1
        if name == "cone":
            gap = gap + (z.clamp(-1, 1) + 1) / 2
    else:
        low, high = _interval(oy / TUBE, dy / TUBE)
        reach = 1.2 / length
        middle = -(ox * dx + oy * dy + oz * dz) / (length * length)
        low, high = torch.maximum(low, middle - reach), torch.minimum(high, middle + reach)
        gap, t = torch.full_like(ox, 9.0), low
        for i in range(8):
            at = low + (high - low).clamp(min=0) * ((i + 0.5) / 8)
            x, y, z = ox + at * dx, oy + at * dy, oz + at * dz
            ring = (x * x + z * z).sqrt() - (1 - TUBE)
            here = (ring * ring + y * y).sqrt() - TUBE
            t, gap = torch.where(here < gap, at, t), torch.minimum(here, gap)
    width = SUN_SPREAD * t.clamp(min=0) * length + 0.02
    hidden = (0.5 - 0.5 * gap / width).clamp(0, 1) * (t > 0)
    return hidden * hidden * (3 - 2 * hidden)


def _interval(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1 / torch.where(d.abs() < 1e-6, 1e-6, d)
    middle, half = -o * inverse, inverse.abs()
    return middle - half, middle + half


def contact(away: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
    """How much of the sky a part hides from nearby points, 0..1 (Q).

    away (3 Q) leads from the points to the part's centre; radius (Q) is the part's, both metres.
    """
    squared = away.square().sum(0) / (radius * radius)
    cosine = (normal * away).sum(0) / (squared.sqrt() * radius + 1e-6)
    window = (1 - squared / CONTACT_REACH**2).clamp(min=0)
    return (cosine * 0.5 + 0.35).clamp(0, 1) * window * window / squared.clamp(min=0.8) * 0.95
