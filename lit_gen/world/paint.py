"""Colour what the pixels show: floors, skies, objects and the shadows among them.

Letters: B scenes, H W picture, N = B H W pixels of a chunk, E parts, W pixels that show an object.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.world import textures
from lit_gen.world.camera import Camera
from lit_gen.world.lighting import CONTACT_REACH, Light, contact, light_of, occlusion, shade, sky_colour
from lit_gen.world.primitives import PRIMITIVES, ROLES, Parts
from lit_gen.world.scene import Scenes
from lit_gen.world.stylise import Layers
from lit_gen.world.trace import CORNERS, FAR, Surface, boxes, pair
from lit_gen.world.vocabulary import FLOORS

_BACKDROP = FLOORS.index("backdrop")


def paint(scenes: Scenes, camera: Camera, parts: Parts, surface: Surface, size: int) -> tuple[Tensor, Layers]:
    """Displayed colours of all pixels (B 3 H W) and the layers that styles are drawn from."""
    count, shape = len(scenes), (3, len(scenes), size * size)
    light = light_of(scenes.time)
    ray = camera.rays(size).transpose(0, 1).reshape(shape)
    length = (ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]).sqrt()
    depth = surface.depth.view(shape[1:])
    position = camera.position.T.contiguous()[:, :, None] + depth * ray
    upright = surface.normals()
    shadow, open_sky = cast_shadows(camera, parts, surface, light, position.view(3, -1), upright, size)
    is_floor = surface.is_floor.view(shape[1:])

    # Surroundings, floor by floor; a backdrop is its own sky.
    colour, brightness = torch.empty_like(position), torch.ones_like(depth)
    plain = (scenes.backdrop.square() * light.backdrop).T[:, :, None]  # 3 B 1
    for code, name in enumerate(FLOORS):
        rows = (scenes.floor == code).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        floor, sun_seen, sky_seen = (v.view(shape[1:]).index_select(0, rows) for v in (is_floor, shadow, open_sky))
        if code == _BACKDROP:
            lit = (0.45 + 0.3 * sun_seen + 0.25 * sky_seen).masked_fill(~floor, 1)
            around = plain[:, rows] * lit
        else:
            here, direction = light[rows], ray[:, rows] / length[rows]
            blur = depth[rows].square() * (2 * camera.tangent / size / camera.position[:, 2].clamp(min=0.1))[rows, None]
            albedo = textures.floor_albedo(name, position[0, rows], position[1, rows], blur)
            glow = (here.sun * here.direction[:, 2:]).T[:, :, None] * sun_seen + here.sky.T[:, :, None] * sky_seen
            lit = glow.sum(0) / (here.sun + here.sky).sum(1, keepdim=True)
            around = torch.where(floor, albedo * glow, sky_colour(direction, here))
        colour[:, rows] = around
        brightness[rows] = lit.masked_fill(~floor, 1)

    # Objects.
    pixel, where = surface.pixel, parts.scene.index_select(0, surface.part)
    colour, brightness = colour.view(3, -1), brightness.view(-1)
    place = position.view(3, -1).index_select(1, pixel)
    albedo = paint_objects(scenes, parts, surface, place)
    table = torch.cat([light.direction, light.sun, light.sky, light.ground, camera.position], 1).T.contiguous()
    table = table.index_select(1, where).view(5, 3, -1)
    seen = [v.index_select(0, pixel) for v in (shadow, open_sky)]
    lit, glow = shade(albedo, surface.normal, table[4] - place, table[:4], *seen)
    colour.scatter_(1, pixel.expand(3, -1), lit)
    brightness.scatter_(0, pixel, glow)

    # What is far away fades into the horizon; a backdrop has none and fades into itself.
    backdrop = scenes.floor == _BACKDROP
    fog = torch.where(backdrop, 0.4 * light.fog, light.fog)[:, None]
    clear = (depth * length * -fog).exp().masked_fill(depth >= FAR, 1)
    haze = torch.where(backdrop[:, None], plain[:, :, 0].T, light.horizon).T[:, :, None]
    colour = torch.lerp(haze, colour.view(shape), clear)
    picture = colour.clamp(0, 1).sqrt().view(3, count, size, size).transpose(0, 1).contiguous()

    label = (is_floor | backdrop[:, None]).to(depth).flatten()
    label.scatter_(0, pixel, (2.0 + 8 * parts.slot + parts.part).index_select(0, surface.part))
    planes = (v.view(count, 1, size, size) for v in (brightness, label))
    return picture, Layers(picture, *planes, upright.view(3, count, size, size).transpose(0, 1))


def paint_objects(scenes: Scenes, parts: Parts, surface: Surface, position: Tensor) -> Tensor:
    """Colour (3 W, linear) of the visible points of objects, whose world positions are 3 W."""
    if not surface.unit:
        return torch.zeros_like(position)
    scene, slot = parts.scene, parts.slot
    colour, pattern, kind, marked, subject = (
        v[scene, slot] for v in (scenes.colour, scenes.pattern, scenes.kind, scenes.marked, scenes.subject)
    )
    trim = textures.TRIM.to(position)[colour]
    fixed = (v.to(position).expand(len(scene), 3) for v in (textures.CREAM, textures.CARROT))
    choice = torch.stack([textures.PALETTE.to(position)[colour], trim, *fixed])
    first = choice[parts.role, torch.arange(len(scene), device=scene.device)]
    own = parts.role == ROLES.index("own")
    shown = torch.where(own & (subject < 0), pattern, 0)
    part = surface.part
    other = torch.cat([textures.patterned(name, p, shown.index_select(0, e)) for name, p, e in surface.unit])
    two = torch.cat([first, trim], 1).T.contiguous().index_select(1, part)
    albedo = torch.where(other, two[3:], two[:3])

    compound = kind >= len(textures.KINDS) - len(textures.COMPOUNDS)
    special = (marked | compound | (subject >= 0)).index_select(0, part).nonzero()[:, 0]
    if len(special) == 0:
        return albedo
    part = part.index_select(0, special)
    yaw = scenes.yaw[scene, slot]
    frame = torch.cat([scenes.position[scene, slot].T, torch.stack([scenes.radius[scene, slot], yaw.cos(), yaw.sin()])])
    x, y, z, radius, cosine, sine = frame.index_select(1, part)
    seen, outward = position.index_select(1, special), surface.normal.index_select(1, special)
    x, y, z = (seen[0] - x) / radius, (seen[1] - y) / radius, (seen[2] - z) / radius
    q = torch.stack([cosine * x + sine * y, cosine * y - sine * x, z])
    facing = cosine * outward[1] - sine * outward[0] < -0.05
    fresh = albedo.index_select(1, special)
    if bool((subject >= 0).any()):
        unique = ((subject >= 0) & own).index_select(0, part)
        fresh = torch.where(unique, textures.subject_albedo(subject, part, q), fresh)
    fresh = textures.painted_details(fresh, q, facing, kind, parts.part, part)
    bullseye = textures.painted_mark(fresh, q, facing, kind, parts.part, part)
    fresh = torch.where(marked.index_select(0, part), bullseye, fresh)
    return albedo.scatter_(1, special.expand(3, -1), fresh)


def cast_shadows(
    camera: Camera, parts: Parts, surface: Surface, light: Light, position: Tensor, upright: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """How much of the sun and of the sky each pixel's point sees: two N in 0..1.

    position and upright (3 N) are points and normals. Where several parts hide the light, the darkest counts.
    """
    shadow, open_sky = torch.ones_like(surface.depth), torch.ones_like(surface.depth)
    owner = torch.full_like(surface.depth, -1, dtype=torch.long).scatter_(0, surface.pixel, surface.part)
    radius = parts.to_world.square().sum((1, 2)).div(3).sqrt()
    direction = light.direction[parts.scene]
    # The box holds the part, its shadow on the floor and the reach of its contact shadow.
    corners = CORNERS.to(position)
    spots = parts.centre[:, :, None] + (parts.to_world[..., None] * (1.1 * corners)).sum(2)
    fallen = spots - direction[:, :, None] * (spots[:, 2:] / direction[:, 2, None, None]).clamp(min=0)
    around = parts.centre[:, :, None] + (0.85 * CONTACT_REACH * radius)[:, None, None] * corners
    around[:, 2] = around[:, 2].clamp(min=0).minimum(spots[:, 2])
    box = boxes(camera[parts.scene].project(torch.cat([spots, fallen, around], 2), size), size)
    ray = (parts.to_unit * direction[:, None]).sum(2)
    rows = torch.cat([parts.centre, radius[:, None], parts.to_unit.flatten(1), ray], 1).T.contiguous()  # 16 E
    points = torch.cat([position, upright])
    for code, name in enumerate(PRIMITIVES):
        here = (parts.primitive == code).nonzero()[:, 0]
        if len(here) == 0:
            continue
        pairs = pair(box[:, here], parts.scene[here], size)
        part, pixel = here[pairs.row_part].index_select(0, pairs.row), pairs.pixel
        table, point = rows.index_select(1, part), points.index_select(1, pixel)
        away = table[0:3] - point[:3]
        to_unit = table[4:13].view(3, 3, -1)
        origin = -(to_unit[:, 0] * away[0] + to_unit[:, 1] * away[1] + to_unit[:, 2] * away[2])
        other = owner.index_select(0, pixel) != part  # a part's own shade is left to its normals
        hidden = occlusion(name, origin, table[13:16]) * other
        shadow.scatter_reduce_(0, pixel, 1 - hidden, "amin")
        open_sky.scatter_reduce_(0, pixel, 1 - contact(away, point[3:], table[3]) * other, "amin")
    return shadow, open_sky
