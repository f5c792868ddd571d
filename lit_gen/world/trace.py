"""What each pixel shows: rays against parts, only inside the parts' boxes on the screen.

Letters: B scenes, N = B H W pixels of a chunk, E parts, Q pairs of a pixel and a part, W pixels that show an object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.world.camera import Camera, pixel_grid
from lit_gen.world.primitives import PRIMITIVES, Parts, hit, normal
from lit_gen.world.scene import Scenes

FAR = 100.0  # depth of pixels that show the sky, metres


@dataclass
class Surface:
    """What the pixels of a chunk show: floor, sky or a part."""

    depth: Tensor  # N
    is_floor: Tensor  # N bool
    pixel: Tensor  # W, pixels that show an object
    part: Tensor  # W, into the E parts
    unit: list[tuple[str, Tensor, Tensor]]  # per primitive: its name, points 3 w in unit space, their parts w
    normal: Tensor  # 3 W, unit, world


def boxes(corners: tuple[Tensor, Tensor, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixel boxes (x, y, width, height; each E) around projected points (x, y, depth; each E P)."""
    x, y, depth = corners
    behind = (depth < 0.05).any(1)
    low_x, low_y = (torch.where(behind, 0, v.amin(1).ceil().clamp(0, size)) for v in (x, y))
    high_x, high_y = (torch.where(behind, size, (v.amax(1).floor() + 1).clamp(0, size)) for v in (x, y))
    width, height = (high_x - low_x).clamp(min=0).long(), (high_y - low_y).clamp(min=0).long()
    return low_x.long(), low_y.long(), width, height


@dataclass
class Pairs:
    """Every pixel of every part's box. Rows R are the boxes' rows."""

    row_part: Tensor  # R
    row_y: Tensor  # R
    row: Tensor  # Q, into rows
    x: Tensor  # Q
    pixel: Tensor  # Q, into the chunk's N pixels


def pair(box: tuple[Tensor, ...], scene: Tensor, size: int) -> Pairs:
    left, top, width, height = box
    parts = torch.arange(len(left), device=left.device)
    row_part = parts.repeat_interleave(height)
    first = height.cumsum(0) - height
    rows = torch.arange(len(row_part), device=left.device)
    row_y = rows - (first - top)[row_part]
    width = width[row_part]
    row = rows.repeat_interleave(width)
    x = torch.arange(len(row), device=left.device) + (left[row_part] - (width.cumsum(0) - width))[row]
    return Pairs(row_part, row_y, row, x, x + ((scene[row_part] * size + row_y) * size)[row])


def trace(scenes: Scenes, camera: Camera, parts: Parts, size: int) -> Surface:
    """What a ray through each pixel's centre meets first."""
    count, device = len(scenes), scenes.kind.device
    ray_z = camera.rays(size)[:, 2]
    drop = -camera.position[:, 2, None, None] / ray_z.clamp(max=-1e-6)
    is_floor = (ray_z < -1e-6) & (camera.position[:, 2, None, None] > 0) & (drop < FAR)
    depth = torch.where(is_floor, drop, FAR).flatten()
    is_floor = is_floor.flatten()

    eye = camera_at(camera, parts.scene)
    origin = (parts.to_unit * (eye.position - parts.centre)[:, None]).sum(2)
    ahead, right, up = (
        (parts.to_unit * v[:, None]).sum(2)
        for v in (eye.forward, eye.right * eye.tangent[:, None], eye.up * eye.tangent[:, None])
    )
    corner = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], device=device).float()
    spots = parts.centre[:, :, None] + (parts.to_world[:, :, None] * corner).sum(3)  # E 3 8
    box = boxes(eye.project(spots, size), size)
    grid = pixel_grid(size, depth)

    found = []
    for code, name in enumerate(PRIMITIVES):
        here = (parts.primitive == code).nonzero()[:, 0]
        if len(here) == 0:
            continue
        pairs = pair(tuple(v[here] for v in box), parts.scene[here], size)
        row_part = here[pairs.row_part]
        start = ahead[row_part] - grid[pairs.row_y][:, None] * up[row_part]
        table = torch.cat([start, right[row_part], origin[row_part]], 1).T.contiguous()[:, pairs.row]
        ray = table[0:3] + grid[pairs.x] * table[3:6]
        t = hit(name, table[6:9], ray)
        met = torch.isfinite(t).nonzero()[:, 0]
        t, pixel, ray, start = t[met], pairs.pixel[met], ray[:, met], table[6:9, met]
        depth.scatter_reduce_(0, pixel, t, "amin")
        found.append((name, t, pixel, start + t * ray, row_part[pairs.row[met]]))

    owner = torch.full_like(depth, len(parts.scene), dtype=torch.long)
    for _, t, pixel, _, part in found:
        seen = (t <= depth[pixel]).nonzero()[:, 0]
        owner.scatter_reduce_(0, pixel[seen], part[seen], "amin")  # the lowest part wins a tie, on every device
    unit, pixels, owners, normals = [], [], [], []
    for name, t, pixel, point, part in found:
        seen = ((owner[pixel] == part) & (t <= depth[pixel])).nonzero()[:, 0]
        point, part = point[:, seen], part[seen]
        unit.append((name, point, part))
        pixels.append(pixel[seen])
        owners.append(part)
        local = normal(name, point)
        outward = (parts.to_unit[part].permute(1, 2, 0) * local[:, None]).sum(0)
        normals.append(outward / outward.square().sum(0).sqrt().clamp(min=1e-12))
    pixel, part = torch.cat(pixels), torch.cat(owners)
    is_floor[pixel] = False
    return Surface(depth, is_floor, pixel, part, unit, torch.cat(normals, 1))


def camera_at(camera: Camera, index: Tensor) -> Camera:
    """The camera of each of E parts."""
    return camera[index]


