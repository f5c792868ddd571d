"""What each pixel shows: rays against parts, only inside the parts' boxes on the screen.

Values are kept as planes (one row per component), gathered with `index_select`: on a CPU that is ten times as fast as
indexing. Letters: B scenes, N = B H W pixels of a chunk, E parts, Q pairs of a pixel and a part, R rows of boxes,
W pixels that show an object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.world.camera import Camera, pixel_grid
from lit_gen.world.primitives import PRIMITIVES, Parts, hit, normal

FAR = 100.0  # depth of pixels that show the sky, metres
CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T  # 3 8


@dataclass
class Surface:
    """What the pixels of a chunk show: floor, sky or a part."""

    depth: Tensor  # N
    is_floor: Tensor  # N bool
    pixel: Tensor  # W, pixels that show an object
    part: Tensor  # W, into the E parts
    normal: Tensor  # 3 W, unit, world
    unit: list[tuple[str, Tensor, Tensor]]  # the W in order: per primitive its name, points 3 w (unit space), parts w

    def normals(self) -> Tensor:
        """World normals of all pixels: 3 N, zero where there is sky."""
        everywhere = torch.zeros(3, len(self.depth), device=self.depth.device)
        everywhere[2] = self.is_floor
        return everywhere.scatter_(1, self.pixel.expand(3, -1), self.normal)


@dataclass
class Pairs:
    """Every pixel of every part's box."""

    row_part: Tensor  # R, into the given parts
    row_y: Tensor  # R, in pixels
    row: Tensor  # Q, into rows
    x: Tensor  # Q, in pixels
    pixel: Tensor  # Q, into the chunk's N pixels


def boxes(points: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """Pixel boxes (4 E: x, y, width, height) around projected points (x, y, depth; each E P)."""
    x, y, depth = points
    behind = (depth < 0.05).any(1)  # not all in front of the camera: take the whole picture
    low = [v.amin(1).ceil().clamp(0, size).masked_fill(behind, 0) for v in (x, y)]
    high = [(v.amax(1).floor() + 1).clamp(0, size).masked_fill(behind, size) for v in (x, y)]
    return torch.stack([*low, *((b - a).clamp(min=0) for a, b in zip(low, high, strict=True))]).long()


def pair(box: Tensor, scene: Tensor, size: int) -> Pairs:
    """List the pixels of E boxes (4 E) in pictures `scene` (E)."""
    left, top, width, height = box
    device = box.device
    row_part = torch.arange(len(left), device=device).repeat_interleave(height)
    rows = torch.arange(len(row_part), device=device)
    row_y = rows + (top - (height.cumsum(0) - height)).index_select(0, row_part)
    width = width.index_select(0, row_part)
    row = rows.repeat_interleave(width)
    from_here = left.index_select(0, row_part) - (width.cumsum(0) - width)
    x = torch.arange(len(row), device=device) + from_here.index_select(0, row)
    start = (scene.index_select(0, row_part) * size + row_y) * size
    return Pairs(row_part, row_y, row, x, x + start.index_select(0, row))


def trace(camera: Camera, parts: Parts, size: int) -> Surface:
    """What a ray through the centre of each of size x size pixels meets first."""
    depth, is_floor = _floor(camera, size)
    eye = camera[parts.scene]
    origin = (parts.to_unit * (eye.position - parts.centre)[:, None]).sum(2)
    axes = (eye.forward, eye.right * eye.tangent[:, None], eye.up * eye.tangent[:, None])
    ahead, right, up = ((parts.to_unit * axis[:, None]).sum(2) for axis in axes)
    spots = parts.centre[:, :, None] + (parts.to_world[..., None] * CORNERS.to(depth)).sum(2)  # E 3 8
    box = boxes(eye.project(spots, size), size)
    grid = pixel_grid(size, depth)

    found = []
    for code, name in enumerate(PRIMITIVES):
        here = (parts.primitive == code).nonzero()[:, 0]
        if len(here) == 0:
            continue
        pairs = pair(box[:, here], parts.scene[here], size)
        row_part = here[pairs.row_part]
        start = ahead[row_part] - grid[pairs.row_y][:, None] * up[row_part]
        rows = torch.cat([start, right[row_part], origin[row_part]], 1).T.contiguous()
        table = rows.index_select(1, pairs.row)
        ray = torch.addcmul(table[0:3], grid.index_select(0, pairs.x), table[3:6])
        t = hit(name, table[6:9], ray)
        depth.scatter_reduce_(0, pairs.pixel, t, "amin")
        found.append((name, t, pairs.pixel, table[6:9], ray, row_part.index_select(0, pairs.row)))

    owner = torch.full(depth.shape, len(parts.scene), dtype=torch.long, device=depth.device)
    seen = []
    for _, t, pixel, _, _, part in found:
        nearest = t <= depth.index_select(0, pixel)
        owner.scatter_reduce_(0, pixel, part.masked_fill(~nearest, len(parts.scene)), "amin")  # ties: the lowest part
        seen.append(nearest)
    nothing = torch.zeros(0, dtype=torch.long, device=depth.device)
    unit, pixels, owners, normals = [], [nothing], [nothing], [depth.new_zeros(3, 0)]
    for (name, t, pixel, origins, ray, part), nearest in zip(found, seen, strict=True):
        won = (nearest & (owner.index_select(0, pixel) == part)).nonzero()[:, 0]
        t, pixel, part = (v.index_select(0, won) for v in (t, pixel, part))
        point = torch.addcmul(origins.index_select(1, won), t, ray.index_select(1, won))
        local = normal(name, point)
        to_unit = parts.to_unit.flatten(1).T.contiguous().index_select(1, part).view(3, 3, -1)
        outward = local[0] * to_unit[0] + local[1] * to_unit[1] + local[2] * to_unit[2]
        normals.append(outward / outward.square().sum(0).sqrt().clamp(min=1e-12))
        unit.append((name, point, part))
        pixels.append(pixel)
        owners.append(part)
    pixel = torch.cat(pixels)
    is_floor.scatter_(0, pixel, False)
    return Surface(depth, is_floor, pixel, torch.cat(owners), torch.cat(normals, 1), unit)


def _floor(camera: Camera, size: int) -> tuple[Tensor, Tensor]:
    """Depth of floor and sky (N) and where there is floor (N bool). The floor is seen from above only."""
    down = camera.rays(size)[:, 2]
    height = camera.position[:, 2, None, None]
    depth = height / (-down).clamp(min=1e-6)
    is_floor = (depth > 0) & (depth < FAR)
    return depth.masked_fill(~is_floor, FAR).flatten(), is_floor.flatten()
