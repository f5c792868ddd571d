"""A renderer as plain as can be, to compare the fast one with: one part after the other, small steps along each ray."""

import math

import torch

from lit_gen.world.camera import camera_of
from lit_gen.world.primitives import PRIMITIVES, TUBE, parts_of
from lit_gen.world.trace import FAR


def implicit(name, p):
    """A function of points (... 3) that is negative inside a unit primitive and zero on its surface."""
    x, y, z = p.unbind(-1)
    flat = (x * x + y * y).sqrt()
    return {
        "ball": lambda: (flat * flat + z * z).sqrt() - 1,
        "cube": lambda: torch.maximum(torch.maximum(x.abs(), y.abs()), z.abs()) - 1,
        "cylinder": lambda: torch.maximum(flat - 1, z.abs() - 1),
        "cone": lambda: torch.maximum(flat - (1 - z) / 2, -1 - z),
        "dome": lambda: torch.maximum((flat * flat + z * z).sqrt() - 1, -z),
        "ring": lambda: (((x * x + z * z).sqrt() - (1 - TUBE)) ** 2 + y * y).sqrt() - TUBE,
    }[name]()


def first_hit(name, origin, ray, near, far, steps=2000):
    """First t in near..far where rays (Q 3 each, float64) enter a primitive: Q, infinite for none. Also the chord."""
    t = near + (far - near) * torch.arange(steps, dtype=torch.float64) / steps
    inside = implicit(name, origin[:, None] + t[:, None] * ray[:, None]) < 0
    hit = inside.any(1)
    high = t[inside.long().argmax(1)]
    low = high - (far - near) / steps
    for _ in range(40):
        middle = (low + high) / 2
        within = implicit(name, origin + middle[:, None] * ray) < 0
        low, high = torch.where(within, low, middle), torch.where(within, middle, high)
    chord = inside.sum(1) * (far - near) / steps
    return torch.where(hit, high, math.inf), chord


def plain_buffers(scenes, size):
    """Depth, instance (each B H W) and normal (B 3 H W) of B scenes, in float64."""
    camera, parts = camera_of(scenes), parts_of(scenes)
    depth = torch.full((len(scenes), size, size), FAR, dtype=torch.float64)
    instance = torch.zeros(depth.shape, dtype=torch.long)
    normal = torch.zeros(len(scenes), size, size, 3, dtype=torch.float64)
    for b in range(len(scenes)):
        eye = camera.position[b].double()
        rays = camera.rays(size)[b].double().permute(1, 2, 0).reshape(-1, 3)
        t = -eye[2] / rays[:, 2]
        floor = (t > 0) & (t < FAR) & (eye[2] > 0)
        best, owner = torch.where(floor, t, FAR), torch.zeros(len(rays), dtype=torch.long)
        facing = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) * floor[:, None]
        for e in (parts.scene == b).nonzero()[:, 0]:
            name = PRIMITIVES[parts.primitive[e]]
            to_unit, centre = parts.to_unit[e].double(), parts.centre[e].double()
            origin, ray = to_unit @ (eye - centre), rays @ to_unit.T
            met, _ = first_hit(name, origin.expand(len(rays), 3), ray, 0.3, 14.0)
            closer = met < best
            p = (origin + torch.where(closer, met, 1.0)[:, None] * ray).requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(implicit(name, p).sum(), p)
            world = torch.nn.functional.normalize(slope @ to_unit, dim=1)
            best, owner = torch.where(closer, met, best), torch.where(closer, parts.slot[e] + 1, owner)
            facing = torch.where(closer[:, None], world, facing)
        depth[b], instance[b], normal[b] = (v.reshape(size, size, *v.shape[1:]) for v in (best, owner, facing))
    return depth, instance, normal.permute(0, 3, 1, 2)
