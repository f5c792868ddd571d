"""Render scenes: batched ray casting against unit primitives, only where their outlines can be in the picture.

The plan, for a chunk of scenes at once: list the parts of all objects; each part is tested on the pixels of its own
bounding box (a flat list of ray-part pairs, no padding); the nearest hit of a pixel wins; shadows are a second list of
pairs over the boxes that shadows can fall in; then floor, sky and objects are coloured. All of it is plain eager torch
on flat lists, so the number of kernel launches does not depend on the number of scenes.

Letters: B scenes, H W picture, N = B H W pixels of a chunk, E parts, Q pairs, W pixels that show an object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.world import textures
from lit_gen.world.camera import Camera, camera_of, pixel_grid
from lit_gen.world.lighting import OCCLUSION_REACH, Light, contact, light_of, occlusion, shade, sky_colour
from lit_gen.world.primitives import PRIMITIVES, ROLES, Parts, hit, normal, parts_of
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import FLOORS

FAR = 100.0  # depth of pixels that show the sky, metres
_BACKDROP = FLOORS.index("backdrop")


@dataclass
class Frames:
    """B pictures and what is true of them at their pixels' centres."""

    rgb: Tensor  # B 3 H W in 0..1
    instance: Tensor  # B H W long, 0 for the background, k + 1 for object k
    depth: Tensor  # B H W, metres along the optical axis; FAR where there is sky
    normal: Tensor  # B 3 H W, unit vectors in world space; zero where there is sky
    camera: Camera


@dataclass
class Surface:
    """What the pixels of a chunk show: floor, sky or a part."""

    depth: Tensor  # N
    is_floor: Tensor  # N bool
    pixel: Tensor  # W, pixels that show an object
    part: Tensor  # W, into the E parts
    unit: list[tuple[str, Tensor, Tensor]]  # per primitive: its name, points 3 w in unit space, their parts w
    normal: Tensor  # 3 W, unit, world


@torch.no_grad()
def render(scenes: Scenes, size: int = 64, supersample: int = 2, chunk: int | None = None) -> Frames:
    """Render B scenes as size x size pictures, averaging supersample x supersample rays a pixel.

    Works on the device the scenes are on. Pictures do not depend on `chunk`, the number of scenes rendered at once.
    """
    if len(scenes) == 0:
        raise ValueError("render: no scenes given; pass at least one")
    chunk = chunk or _chunk_length(scenes.kind.device, size * supersample)
    done = [_render_chunk(scenes[i : i + chunk], size, supersample) for i in range(0, len(scenes), chunk)]
    return Frames(
        *(torch.cat([getattr(f, name) for f in done]) for name in ("rgb", "instance", "depth", "normal")),
        camera=camera_of(scenes),
    )


def _chunk_length(device: torch.device, size: int) -> int:
    """How many scenes at once: pixel planes that stay in a CPU's cache, or that keep a GPU busy."""
    pixels = 2**18 if device.type == "cpu" else 2**23
    return max(1, pixels // size**2)


def _render_chunk(scenes: Scenes, size: int, supersample: int) -> Frames:
    camera, parts = camera_of(scenes), parts_of(scenes)
    fine = size * supersample
    surface = trace(scenes, camera, parts, fine)
    rgb = paint(scenes, camera, parts, surface, fine)
    rgb = F.avg_pool2d(rgb, supersample) if supersample > 1 else rgb
    truth = trace(scenes, camera, parts, size) if supersample > 1 else surface
    shape = (len(scenes), size, size)
    instance = torch.zeros(len(truth.depth), dtype=torch.long, device=rgb.device)
    instance[truth.pixel] = parts.slot[truth.part] + 1
    normals = torch.zeros(3, len(truth.depth), device=rgb.device)
    normals[2] = truth.is_floor.to(normals)
    normals[:, truth.pixel] = truth.normal
    return Frames(
        rgb.clamp(0, 1),
        instance.view(shape),
        truth.depth.view(shape),
        normals.view(3, *shape).transpose(0, 1).contiguous(),
        camera,
    )


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


def paint(scenes: Scenes, camera: Camera, parts: Parts, surface: Surface, size: int) -> Tensor:
    """Displayed colours of all pixels: B 3 H W."""
    count = len(scenes)
    light = light_of(scenes.time)
    ray = camera.rays(size)
    length = ray.square().sum(1, keepdim=True).sqrt()
    depth = surface.depth.view(count, 1, size, size)
    position = (camera.position[:, :, None, None] + depth * ray).transpose(0, 1).reshape(3, -1)
    upright = torch.zeros_like(position)
    upright[2] = 1
    upright[:, surface.pixel] = surface.normal
    shadow, open_sky = cast_shadows(camera, parts, surface, light, position, upright, size)
    scene = torch.arange(count, device=ray.device).repeat_interleave(size * size)

    backdrop = scenes.floor == _BACKDROP
    colour = sky_colour(ray / length, light)
    plain = scenes.backdrop.square() * light.backdrop
    colour = torch.where(backdrop[:, None, None, None], plain[:, :, None, None], colour)
    colour = colour.transpose(0, 1).reshape(3, -1).contiguous()
    brightness = torch.ones_like(shadow)

    # Floors, kind by kind.
    kind = torch.where(surface.is_floor, scenes.floor[scene], -1)
    blur = (depth.flatten() ** 2 * (2 * camera.tangent / size / camera.position[:, 2].clamp(min=0.1))[scene]) ** 1.0
    for code, name in enumerate(FLOORS):
        here = (kind == code).nonzero()[:, 0]
        if len(here) == 0:
            continue
        where = scene[here]
        if code == _BACKDROP:
            veil = 0.45 + 0.3 * shadow[here] + 0.25 * open_sky[here]
            colour[:, here] = plain[where].T * veil
            brightness[here] = veil
            continue
        albedo = textures.floor_albedo(name, position[0, here], position[1, here], blur[here])
        lit = light.sun[where].T * light.direction[where, 2] * shadow[here] + light.sky[where].T * open_sky[here]
        colour[:, here] = albedo * lit
        brightness[here] = lit.sum(0) / (light.sun + light.sky)[where].sum(1)

    # Objects.
    pixel, where = surface.pixel, parts.scene[surface.part]
    albedo = paint_objects(scenes, parts, surface, position[:, pixel])
    view = camera.position[where].T - position[:, pixel]
    view = view / view.square().sum(0).sqrt()
    lights = [v[where].T for v in (light.direction, light.sun, light.sky, light.ground)]
    colour[:, pixel], brightness[pixel] = shade(
        albedo, surface.normal, view, lights, shadow[pixel], open_sky[pixel]
    )

    # What is far away fades into the horizon; a seamless backdrop has none.
    distance = (depth * length).flatten()
    fade = 1 - (-distance * torch.where(backdrop, 0.4 * light.fog, light.fog)[scene]).exp()
    fade = torch.where(surface.depth < FAR, fade, 0)
    haze = torch.where(backdrop[:, None], plain, light.horizon)[scene].T
    colour = colour + (haze - colour) * fade
    return colour.clamp(0, 1).sqrt().view(3, count, size, size).transpose(0, 1)


def paint_objects(scenes: Scenes, parts: Parts, surface: Surface, position: Tensor) -> Tensor:
    """Colour (3 W, linear) of the visible points of objects, whose world positions are 3 W."""
    where, slot = parts.scene, parts.slot
    colour, pattern, kind = (v[where, slot] for v in (scenes.colour, scenes.pattern, scenes.kind))
    palette, trim = textures.PALETTE.to(position), textures.TRIM.to(position)
    cream, carrot = (v.to(position).expand(len(where), 3) for v in (textures.CREAM, textures.CARROT))
    second = trim[colour]
    first = torch.stack([palette[colour], second, cream, carrot], 1)[torch.arange(len(where)), parts.role]
    own = parts.role == ROLES.index("own")
    shown = torch.where(own, pattern, 0)
    other = torch.cat([textures.patterned(name, p, shown[part]) for name, p, part in surface.unit])
    part = surface.part
    albedo = torch.where(other, second[part].T, first[part].T)

    marked, subject = scenes.marked[where, slot], scenes.subject[where, slot]
    special = (marked | (kind >= len(textures.KINDS) - len(textures.COMPOUNDS)) | (subject >= 0))[part].nonzero()[:, 0]
    if len(special) == 0:
        return albedo
    part = part[special]
    away = (position[:, special] - scenes.position[where, slot][part].T) / scenes.radius[where, slot][part]
    yaw = scenes.yaw[where, slot][part]
    cosine, sine = yaw.cos(), yaw.sin()
    q = torch.stack([cosine * away[0] + sine * away[1], cosine * away[1] - sine * away[0], away[2]])
    outward = surface.normal[:, special]
    facing = cosine * outward[1] - sine * outward[0] < -0.05
    paint = albedo[:, special]
    unique = (subject >= 0) & own
    if bool(unique.any()):
        paint = torch.where(unique[part], textures.subject_albedo(subject, part, q), paint)
    paint = textures.painted_details(paint, q, facing, kind[part], parts.part[part])
    bullseye = textures.painted_mark(paint, q, facing, kind[part], parts.part[part])
    albedo[:, special] = torch.where(marked[part], bullseye, paint)
    return albedo


def cast_shadows(
    camera: Camera, parts: Parts, surface: Surface, light: Light, position: Tensor, upright: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """How much of the sun and of the sky each pixel's point sees: two N in 0..1. Darkest occluder wins."""
    device = position.device
    shadow, open_sky = torch.ones_like(surface.depth), torch.ones_like(surface.depth)
    owner = torch.full_like(surface.depth, -1, dtype=torch.long)
    owner[surface.pixel] = surface.part
    solid = surface.is_floor.clone()
    solid[surface.pixel] = True
    radius = parts.to_world.square().sum((1, 2)).div(3).sqrt()
    direction = light.direction[parts.scene]
    # The box holds the reach of the contact shadow and the shadow's footprint on the floor.
    reach = (radius * OCCLUSION_REACH)[:, None, None]
    corner = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], device=device).float().T
    ball = parts.centre[:, :, None] + 0.8 * reach * corner
    ball[:, 2].clamp_(min=0)
    spots = parts.centre[:, :, None] + (parts.to_world[:, :, None] * (1.15 * corner.T)).sum(3)
    fallen = spots - direction[:, :, None] * (spots[:, 2:] / direction[:, 2, None, None]).clamp(min=0)
    eye = camera_at(camera, parts.scene)
    box = boxes(eye.project(torch.cat([ball, fallen], 2), size), size)
    ray = (parts.to_unit * direction[:, None]).sum(2)
    for code, name in enumerate(PRIMITIVES):
        here = (parts.primitive == code).nonzero()[:, 0]
        if len(here) == 0:
            continue
        pairs = pair(tuple(v[here] for v in box), parts.scene[here], size)
        part = here[pairs.row_part][pairs.row]
        use = (solid[pairs.pixel] & (owner[pairs.pixel] != part)).nonzero()[:, 0]
        part, pixel = part[use], pairs.pixel[use]
        away = parts.centre.T[:, part] - position[:, pixel]
        to_unit = parts.to_unit.permute(1, 2, 0)[:, :, part]
        hidden = occlusion(name, -(to_unit * away).sum(1), ray.T[:, part])
        shadow.scatter_reduce_(0, pixel, 1 - hidden, "amin")
        near = contact(away, upright[:, pixel], radius[part])
        open_sky.scatter_reduce_(0, pixel, 1 - near, "amin")
    return shadow, open_sky
