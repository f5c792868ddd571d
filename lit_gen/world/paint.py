"""Colour what the pixels show: floors, skies, objects and the shadows among them.

Letters: B scenes, H W picture, N = B H W pixels of a chunk, E parts, W pixels that show an object.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.world import textures
from lit_gen.world.camera import Camera
from lit_gen.world.lighting import OCCLUSION_REACH, Light, contact, light_of, occlusion, shade, sky_colour
from lit_gen.world.primitives import PRIMITIVES, ROLES, Parts
from lit_gen.world.scene import Scenes
from lit_gen.world.trace import FAR, Surface, boxes, pair
from lit_gen.world.vocabulary import FLOORS

_BACKDROP = FLOORS.index("backdrop")


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
