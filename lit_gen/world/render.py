"""Render scenes: batched ray casting against unit primitives, only where their outlines can be in the picture.

The plan, for a chunk of scenes at once: list the parts of all objects; each part is tested on the pixels of its own
bounding box (a flat list of ray-part pairs, no padding); the nearest hit of a pixel wins (`trace`); shadows are a
second list of pairs over the boxes that shadows can fall in; floor, sky and objects are coloured (`paint`); styled
pictures are drawn over (`stylise`). All of it is plain eager torch on flat lists, so the number of kernel launches does
not depend on the number of scenes.

Letters: B scenes, F frames, H W picture, K objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.world.camera import Camera, camera_of
from lit_gen.world.motion import animate
from lit_gen.world.paint import paint
from lit_gen.world.primitives import parts_of
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import NAMED
from lit_gen.world.stylise import Layers, stylise
from lit_gen.world.trace import FAR, trace

NO_SURFACE = 0.5  # grey of a normal map's background, the zero vector


@dataclass
class Frames:
    """B pictures and what is true of them at their pixels' centres."""

    rgb: Tensor  # B 3 H W in 0..1
    instance: Tensor  # B H W long, 0 for the background, k + 1 for object k
    depth: Tensor  # B H W, metres along the optical axis; trace.FAR where there is sky
    normal: Tensor  # B 3 H W, unit vectors in world space; zero where there is sky
    camera: Camera  # of the B pictures


@dataclass
class Clip:
    """B videos of F frames and what is true of them at their pixels' centres."""

    rgb: Tensor  # B F 3 H W in 0..1
    instance: Tensor  # B F H W long
    depth: Tensor  # B F H W, metres
    normal: Tensor  # B F 3 H W, world space
    flow: Tensor  # B F-1 2 H W, pixels (x, y) that the point seen at a pixel moves by until the next frame
    camera: Camera  # of the B * F pictures, those of one video side by side


@torch.no_grad()
def render(scenes: Scenes, size: int = 64, supersample: int = 2, chunk: int | None = None) -> Frames:
    """Render B scenes as size x size pictures, averaging supersample x supersample rays a pixel.

    Works on the device the scenes are on. Pictures do not depend on `chunk`, the number of scenes rendered at once.
    A scene with `normals` becomes a normal map: (right, up, towards the eye) of the camera as red, green, blue.
    """
    if len(scenes) == 0:
        raise ValueError("render: no scenes given; pass at least one")
    chunk = chunk or _chunk_length(scenes.kind.device, size * supersample)
    with torch.autocast(scenes.kind.device.type, enabled=False):  # trainers call this from within mixed precision
        done = [_render_chunk(scenes[i : i + chunk], size, supersample) for i in range(0, len(scenes), chunk)]
    buffers = (torch.cat([getattr(f, name) for f in done]) for name in ("rgb", "instance", "depth", "normal"))
    return Frames(*buffers, camera=camera_of(scenes))


@torch.no_grad()
def render_video(scenes: Scenes, frames: int = 8, size: int = 64, supersample: int = 2) -> Clip:
    """Render the motions of B scenes as videos of F frames, evenly spaced over the whole motion."""
    times = torch.linspace(0, 1, frames, device=scenes.kind.device)
    moments = animate(scenes, times)
    shots = render(moments, size, supersample)
    split = {name: getattr(shots, name).unflatten(0, (-1, frames)) for name in ("rgb", "instance", "depth", "normal")}
    first = torch.arange(len(moments), device=times.device).view(-1, frames)[:, :-1].flatten()
    moved = flow(moments[first], moments[first + 1], shots.depth[first], shots.instance[first])
    return Clip(**split, flow=moved.unflatten(0, (-1, frames - 1)), camera=shots.camera)


def flow(now: Scenes, then: Scenes, depth: Tensor, instance: Tensor) -> Tensor:
    """How far (x, y, in pixels) the points seen at each pixel move between two moments of B scenes: B 2 H W.

    depth and instance (B H W) are those of `now`. Objects move, turn and scale as wholes, the ground stays, and the sky
    is so far away that only turning the camera moves it.
    """
    size = depth.shape[-1]
    before, after = camera_of(now), camera_of(then)
    away = depth[:, None] * before.rays(size)
    point = before.position[:, :, None, None] + away
    row = torch.arange(len(depth), device=depth.device)[:, None, None]
    slot = (instance - 1).clamp(min=0)
    start, end = (s.position[row, slot].permute(0, 3, 1, 2) for s in (now, then))
    turn = (then.yaw - now.yaw)[row, slot]
    growth = (then.radius / now.radius.clamp(min=1e-6))[row, slot]
    x, y, z = ((point - start) * growth[:, None]).unbind(1)
    moved = end + torch.stack([turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y, z], 1)
    moved = torch.where((instance > 0)[:, None], moved, point)
    moved = torch.where((depth >= FAR)[:, None], after.position[:, :, None, None] + away, moved)
    across, down, _ = after.project(moved, size)
    grid = torch.arange(size, device=depth.device, dtype=depth.dtype)
    return torch.stack([across - grid[None, None, :], down - grid[None, :, None]], 1)


def _chunk_length(device: torch.device, size: int) -> int:
    """How many scenes at once: pixel planes that stay in a CPU's cache, or that keep a GPU busy.

    A chunk is some 5,500 kernels whatever its length, so that a GPU's is as long as memory allows: a pixel takes about
    210 bytes at the peak, and a fifth of what is free is taken.
    """
    pixels = 2**19
    if device.type == "cuda":
        pixels = min(2**26, max(2**20, torch.cuda.mem_get_info(device)[0] // 1024))
    return max(1, pixels // size**2)


def _render_chunk(scenes: Scenes, size: int, supersample: int) -> Frames:
    camera, parts = camera_of(scenes), parts_of(scenes)
    fine = size * supersample
    surface = trace(camera, parts, fine)
    colour, layers = paint(scenes, camera, parts, surface, fine)
    mapped = scenes.normals.nonzero()[:, 0]
    if len(mapped):
        colour[mapped] = _normal_map(layers[mapped], camera[mapped])
    plain = NAMED[0].to(scenes.style_parameters)
    styled = ((scenes.style_parameters != plain).any(1) & ~scenes.normals).nonzero()[:, 0]
    if len(styled):
        colour[styled] = stylise(layers[styled], scenes.style_parameters[styled])
    if supersample > 1:
        colour = F.avg_pool2d(colour, supersample)
        surface = trace(camera, parts, size)
    shape = (len(scenes), size, size)
    instance = torch.zeros(surface.depth.shape, dtype=torch.long, device=colour.device)
    instance[surface.pixel] = parts.slot[surface.part] + 1
    normals = surface.normals().view(3, *shape).transpose(0, 1).contiguous()
    return Frames(colour, instance.view(shape), surface.depth.view(shape), normals, camera)


def _normal_map(layers: Layers, camera: Camera) -> Tensor:
    """Normals of objects in camera space as colours: B 3 H W."""
    axes = torch.stack([camera.right, camera.up, -camera.forward], 1)  # B 3 3
    seen = (axes[:, :, :, None, None] * layers.normal[:, None]).sum(2) * (layers.label > 1.5)
    return NO_SURFACE + 0.5 * seen
