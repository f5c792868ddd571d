"""The solids of the world: every kind of object is one to four unit primitives under affine maps.

An object's own frame has its lowest point at the origin, z up and its front at -y, in units of the object's `radius`.
Every primitive fits into the cube -1..1. Letters: E parts of all scenes of a batch, Q rays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import KINDS

PRIMITIVES = ("ball", "cube", "cylinder", "cone", "ring", "dome")  # dome: the upper half of a ball
ROLES = ("own", "trim", "cream", "carrot")  # what a part's colour comes from; only "own" parts carry patterns
TUBE = 0.32  # radius of the ring's tube; the ring stands upright around the y axis and has an outer radius of 1
_CORE = 1 - TUBE

_EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_FORWARDS = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))  # z of the primitive points to the front
_SIDEWAYS = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0))  # z of the primitive points to the side
_H = math.sqrt(0.5)
_DIAMOND = ((_H, 0.0, -_H), (0.0, 1.0, 0.0), (_H, 0.0, _H))  # an edge of the cube points up

# kind: parts as (primitive, centre, half extents, rotation, role); extents act after the rotation.
_PARTS = {
    "ball": [("ball", (0, 0, 1), (1, 1, 1), _EYE, "own")],
    "cube": [("cube", (0, 0, 0.85), (0.85, 0.85, 0.85), _EYE, "own")],
    "cylinder": [("cylinder", (0, 0, 0.95), (0.75, 0.75, 0.95), _EYE, "own")],
    "cone": [("cone", (0, 0, 1), (0.95, 0.95, 1), _EYE, "own")],
    "ring": [("ring", (0, 0, 1), (1, 1, 1), _EYE, "own")],
    "snowman": [
        ("ball", (0, 0, 0.62), (0.64, 0.64, 0.62), _EYE, "own"),
        ("ball", (0, 0, 1.5), (0.47, 0.47, 0.47), _EYE, "own"),
        ("cone", (0, -0.62, 1.46), (0.14, 0.24, 0.14), _FORWARDS, "carrot"),
    ],
    "house": [
        ("cube", (0, 0, 0.58), (0.86, 0.7, 0.58), _EYE, "own"),
        ("cube", (0, 0, 1.14), (0.97 * _H, 0.69, 0.8 * _H), _DIAMOND, "trim"),
        ("cube", (0.45, 0.2, 1.62), (0.14, 0.14, 0.34), _EYE, "cream"),
    ],
    "mushroom": [
        ("dome", (0, 0, 0.88), (0.95, 0.95, 0.92), _EYE, "own"),
        ("cylinder", (0, 0, 0.45), (0.42, 0.42, 0.45), _EYE, "cream"),
    ],
    "dumbbell": [
        ("ball", (-0.72, 0, 0.52), (0.52, 0.52, 0.52), _EYE, "own"),
        ("ball", (0.72, 0, 0.52), (0.52, 0.52, 0.52), _EYE, "own"),
        ("cylinder", (0, 0, 0.52), (0.55, 0.2, 0.2), _SIDEWAYS, "trim"),
    ],
    "rocket": [
        ("cylinder", (0, 0, 0.85), (0.42, 0.42, 0.6), _EYE, "own"),
        ("cone", (0, 0, 1.72), (0.42, 0.42, 0.28), _EYE, "trim"),
        ("cube", (0, 0, 0.3), (0.82, 0.07, 0.3), _EYE, "trim"),
        ("cube", (0, 0, 0.3), (0.07, 0.82, 0.3), _EYE, "trim"),
    ],
}
_SLOTS = max(len(parts) for parts in _PARTS.values())

# Per kind, in units of the radius: that of the upright cylinder around the axis that holds the object, and its height.
FOOTPRINT = torch.tensor([1.0, 1.21, 0.75, 0.95, 1.0, 0.86, 1.2, 0.95, 1.24, 0.83])
HEIGHT = torch.tensor([2.0, 1.7, 1.9, 2.0, 2.0, 1.97, 1.96, 1.8, 1.04, 2.0])


def _table() -> dict[str, Tensor]:
    shape = (len(KINDS), _SLOTS)
    primitive, role = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    centre, linear = torch.zeros(*shape, 3), torch.eye(3).repeat(*shape, 1, 1)
    for i, kind in enumerate(KINDS):
        for j, (name, middle, extent, rotation, what) in enumerate(_PARTS[kind]):
            primitive[i, j], role[i, j] = PRIMITIVES.index(name), ROLES.index(what)
            centre[i, j] = torch.tensor(middle)
            linear[i, j] = torch.tensor(extent)[:, None] * torch.tensor(rotation)
    return {"primitive": primitive, "role": role, "centre": centre, "linear": linear, "inverse": linear.inverse()}


_TABLE = _table()


@dataclass
class Parts:
    """The E primitives of a batch of scenes, sorted by primitive, with their maps between world and unit space."""

    primitive: Tensor  # E, into PRIMITIVES
    scene: Tensor  # E, which scene of the batch
    slot: Tensor  # E, which object of the scene
    part: Tensor  # E, which part of the object
    role: Tensor  # E, into ROLES
    centre: Tensor  # E 3, metres
    to_world: Tensor  # E 3 3: world = centre + to_world @ unit
    to_unit: Tensor  # E 3 3: unit = to_unit @ (world - centre)


def parts_of(scenes: Scenes) -> Parts:
    """All primitives that are present in B scenes."""
    device = scenes.kind.device
    table = {name: value.to(device) for name, value in _TABLE.items()}
    kinds = scenes.kind.clamp(min=0)
    primitives = torch.where(scenes.kind[..., None] >= 0, table["primitive"][kinds], -1)  # B K parts
    scene, slot, part = (primitives >= 0).nonzero(as_tuple=True)
    order = primitives[scene, slot, part].sort(stable=True).indices
    scene, slot, part = scene[order], slot[order], part[order]
    kind = scenes.kind[scene, slot]
    radius, yaw = scenes.radius[scene, slot], scenes.yaw[scene, slot]
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, one], 1).view(-1, 3, 3)
    return Parts(
        primitive=primitives[scene, slot, part],
        scene=scene,
        slot=slot,
        part=part,
        role=table["role"][kind, part],
        centre=scenes.position[scene, slot] + radius[:, None] * _apply(turn, table["centre"][kind, part]),
        to_world=radius[:, None, None] * _compose(turn, table["linear"][kind, part]),
        to_unit=_compose(table["inverse"][kind, part], turn.transpose(1, 2)) / radius[:, None, None],
    )


# Written out instead of matmul, which may run in TF32 on a GPU.
def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector[:, None, :]).sum(2)


def _compose(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, :, None] * right[:, None, :, :]).sum(2)


def hit(name: str, origin: Tensor, ray: Tensor) -> Tensor:
    """First hit of rays origin + t * ray (3 Q each, unit space) with a primitive: t of Q rays, infinite where missed.

    Only hits with t > 0 of rays that start outside count.
    """
    t = {"ball": _hit_ball, "cube": _hit_cube, "cylinder": _hit_cylinder, "cone": _hit_cone, "dome": _hit_dome}.get(
        name, _hit_ring
    )(*origin, *ray)
    return torch.where(t > 0, t, math.inf)


def normal(name: str, p: Tensor) -> Tensor:
    """Outward normals (3 Q, not of unit length) at points p (3 Q) of a primitive's surface, in unit space."""
    x, y, z = p
    if name == "ball":
        return p
    if name == "cube":
        size = p.abs()
        largest = (size == size.amax(0)).to(p) * p.sign()
        return largest
    flat = torch.hypot(x, y)
    if name == "cylinder":
        cap = (z.abs() - 1).abs() < (flat - 1).abs()
        return torch.stack([x.masked_fill(cap, 0), y.masked_fill(cap, 0), torch.where(cap, z.sign(), 0)])
    if name == "cone":
        cap = (z + 1).abs() < (flat - (1 - z) / 2).abs()
        inverse = 1 / flat.clamp(min=1e-6)
        return torch.stack(
            [(x * inverse).masked_fill(cap, 0), (y * inverse).masked_fill(cap, 0), torch.where(cap, -1.0, 0.5)]
        )
    if name == "dome":
        cap = z.abs() < (torch.hypot(flat, z) - 1).abs()
        return torch.stack([x.masked_fill(cap, 0), y.masked_fill(cap, 0), torch.where(cap, -1.0, z)])
    around = torch.hypot(x, z).clamp(min=1e-6)
    pull = 1 - _CORE / around
    return torch.stack([x * pull, y, z * pull])


def _root(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Smaller and larger t of a t^2 + 2 b t + c = 0; the smaller is +inf and the larger -inf without a root."""
    inner = b * b - a * c
    half = inner.clamp(min=0).sqrt()
    missed = inner < 0
    return ((-b - half) / a).masked_fill(missed, math.inf), ((-b + half) / a).masked_fill(missed, -math.inf)


def _closest(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
    """Move ray origins to where they pass nearest to the centre: far cameras would cost the roots their digits."""
    start = -(ox * dx + oy * dy + oz * dz) / (dx * dx + dy * dy + dz * dz)
    return start, ox + start * dx, oy + start * dy, oz + start * dz


def _hit_ball(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    squared = dx * dx + dy * dy + dz * dz
    start = -(ox * dx + oy * dy + oz * dz) / squared
    qx, qy, qz = ox + start * dx, oy + start * dy, oz + start * dz
    inner = 1 - (qx * qx + qy * qy + qz * qz)
    return torch.where(inner >= 0, start - (inner.clamp(min=0) / squared).sqrt(), math.inf)


def _slab(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of t in which o + t d lies in -1..1."""
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    middle, half = -o * inverse, inverse.abs()
    return middle - half, middle + half


def _hit_cube(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    (x0, x1), (y0, y1), (z0, z1) = _slab(ox, dx), _slab(oy, dy), _slab(oz, dz)
    near, far = torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1)
    return torch.where(near <= far, near, math.inf)


def _hit_cylinder(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    start, ox, oy, oz = _closest(ox, oy, oz, dx, dy, dz)
    z0, z1 = _slab(oz, dz)
    r0, r1 = _root((dx * dx + dy * dy).clamp(min=1e-12), ox * dx + oy * dy, ox * ox + oy * oy - 1)
    near = torch.maximum(z0, r0)
    return torch.where(near <= torch.minimum(z1, r1), start + near, math.inf)


def _hit_cone(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    start, ox, oy, oz = _closest(ox, oy, oz, dx, dy, dz)
    # Side: x^2 + y^2 = ((1 - z) / 2)^2 below the apex.
    height, slope = (1 - oz) / 2, -dz / 2
    a = dx * dx + dy * dy - slope * slope
    a = torch.where(a.abs() < 1e-9, 1e-9, a)
    b = ox * dx + oy * dy - height * slope
    inner = b * b - a * (ox * ox + oy * oy - height * height)
    half = inner.clamp(min=0).sqrt()
    best = torch.full_like(ox, math.inf)
    for t in ((-b - half) / a, (-b + half) / a):
        z = oz + t * dz
        best = torch.minimum(best, torch.where((inner >= 0) & (z >= -1) & (z <= 1), t, math.inf))
    t = (-1 - oz) / torch.where(dz.abs() < 1e-9, 1e-9, dz)
    x, y = ox + t * dx, oy + t * dy
    best = torch.minimum(best, torch.where(x * x + y * y <= 1, t, math.inf))
    return start + best


def _hit_dome(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    start, ox, oy, oz = _closest(ox, oy, oz, dx, dy, dz)
    b, squared = ox * dx + oy * dy + oz * dz, dx * dx + dy * dy + dz * dz
    t = _root(squared, b, ox * ox + oy * oy + oz * oz - 1)[0]
    best = torch.where(oz + t * dz >= 0, t, math.inf)
    t = -oz / torch.where(dz.abs() < 1e-9, 1e-9, dz)
    x, y = ox + t * dx, oy + t * dy
    return start + torch.minimum(best, torch.where(x * x + y * y <= 1, t, math.inf))


def _hit_ring(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    """Sphere tracing inside the ring's bounding ball and slab (a quartic's closed form loses too many digits)."""
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    dx, dy, dz = dx / length, dy / length, dz / length
    start, ox, oy, oz = _closest(ox, oy, oz, dx, dy, dz)
    y0, y1 = _slab(oy / TUBE, dy / TUBE)
    r0, r1 = _root(torch.ones_like(ox), torch.zeros_like(ox), ox * ox + oy * oy + oz * oz - 1)
    t, far = torch.maximum(y0, r0), torch.minimum(y1, r1)
    index = (t <= far).nonzero()[:, 0]  # only rays that can hit march on
    few = torch.stack([ox, oy, oz, dx, dy, dz, t, far]).index_select(1, index)
    ox, oy, oz, dx, dy, dz, march, end = few
    for _ in range(36):
        x, y, z = ox + march * dx, oy + march * dy, oz + march * dz
        around = (x * x + z * z).sqrt() - _CORE
        gap = (around * around + y * y).sqrt() - TUBE
        # No tiny steps beside the ring, where a ray that grazes it and hits its other side would starve.
        march = march + torch.where(gap > 3e-5, gap.clamp(min=0.01), gap)
    found = torch.where((march <= end + 1e-4) & (gap < 3e-4), march, math.inf)
    return (start + torch.full_like(start, math.inf).index_copy(0, index, found)) / length
