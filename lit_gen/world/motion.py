"""Motion scripts: a still scene and times of a clip to the scene at each of those times.

Letters: B scenes, F times. Motions are sized by what the camera sees, so a mover stays in the picture whatever its
distance, and each of `vocabulary.MOTIONS` is plain within eight frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_gen.world.placement import camera_axes
from lit_gen.world.primitives import FOOTPRINT
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import MOTIONS

# At speed 1, over a whole clip; "half pictures" are half the picture's width at the mover's depth.
TRAVEL = 0.48  # half pictures to either side of the middle of the path
JUMP = 0.62  # half pictures up
TURN = 0.45 * 2 * math.pi  # radians of a spin
GROWTH = 2.2  # ratio of last to first size
ORBIT = math.radians(100)  # the camera's way around what "is circled"


def animate(scenes: Scenes, times: Tensor) -> Scenes:
    """The B scenes at F times (F floats, 0 first to 1 last): B*F scenes, all times of the first scene first.

    Scenes without a motion stand still. The scene itself is the middle of a path, the foot of a jump, the start of a
    spin, half way through growing, shrinking and being circled.
    """
    frames = len(times)
    out = scenes[torch.arange(len(scenes), device=scenes.index.device).repeat_interleave(frames)]
    time = times.to(out.radius).repeat(len(scenes))  # B*F
    motion = [out.motion == i for i in range(len(MOTIONS))]
    _, left, right, jumps, spins, grows, shrinks, circled = motion

    rows, mover = torch.arange(len(out), device=out.index.device), out.mover.clamp(min=0)
    kind, radius, position = out.kind[rows, mover], out.radius[rows, mover], out.position[rows, mover]
    axes = camera_axes(out.azimuth, out.elevation)  # 3 axes per scene: right, up, forward
    offset = position - out.target
    depth = out.distance + (offset * axes[:, 2]).sum(1)
    view = depth * (out.fov / 2).tan()  # B*F metres, half the picture at the mover
    room = view * 0.93 - FOOTPRINT.to(radius)[kind.clamp(min=0)] * radius * 1.08
    sideways = (offset * axes[:, 0]).sum(1)  # where the mover stands in the picture
    top = ((offset * axes[:, 1]).sum(1) + 2 * radius * out.elevation.cos()) / out.elevation.cos()
    headroom = 0.95 * view / out.elevation.cos() - top  # for what moves up by the floor's normal
    travel = torch.minimum(TRAVEL * out.speed * view, room - sideways.abs()).clamp(min=0)

    still = torch.zeros_like(time)
    height = torch.minimum(JUMP * out.speed * view, headroom).clamp(min=0)
    swing = (2 * time - 1) * travel
    along = torch.where(left, -swing, torch.where(right, swing, still))
    lift = torch.where(jumps, 4 * time * (1 - time) * height, still)
    moved = position + along[:, None] * axes[:, 0]
    moved[:, 2] += lift
    growth = (time - 0.5) * math.log(GROWTH) * out.speed
    scale = torch.where(grows, growth, torch.where(shrinks, -growth, still)).exp()
    spin = torch.where(spins, time * TURN * out.speed, still)
    orbit = torch.where(circled, (time - 0.5) * ORBIT * out.speed, still)

    new_position, new_radius, new_yaw = out.position.clone(), out.radius.clone(), out.yaw.clone()
    new_position[rows, mover] = moved
    new_radius[rows, mover] = radius * scale
    new_yaw[rows, mover] += spin
    return out.replace(position=new_position, radius=new_radius, yaw=new_yaw, azimuth=out.azimuth + orbit)
