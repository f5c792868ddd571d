"""What the oracle says about pictures and videos, as plain tensors that compare directly with `Scenes`.

Letters: B images, K = 3 slots (in no particular order), H W pixels, P style parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_gen.metrics.network import FACING_BINS
from lit_gen.world.styles import CIRCULAR, STYLE_PARAMETERS
from lit_gen.world.vocabulary import ABSENT, RELATIONS, STYLES


@dataclass
class Reading:
    """B pictures as read by the oracle. Indices refer to `lit_gen.world.vocabulary`, -1 means none."""

    present: Tensor  # B K bool, the slot holds an object; the following rows mean something only where it does
    kind: Tensor  # B K, into KINDS
    colour: Tensor  # B K, into COLOURS
    pattern: Tensor  # B K, into PATTERNS
    size: Tensor  # B K, into SIZES
    marked: Tensor  # B K bool, a painted spot is seen or inferred
    special: Tensor  # B K bool, a subject: its texture has no name
    facing: Tensor  # B K, radians: how far the camera stands round the object from its front, -pi..pi
    facing_certainty: Tensor  # B K, 0..1; low where the object's front cannot be told
    box: Tensor  # B K 4, centre x, centre y, width, height of what is visible, fractions of the picture
    mask: Tensor  # B K 64 64 bool
    embedding: Tensor  # B K 64, unit length, the same for the same subject in any picture
    relation: Tensor  # B K K 6, probability of slot i in relation r to slot j; "next to" is whatever is not stacked
    style: Tensor  # B, into STYLES; -1 for a continuous style without a name
    style_parameters: Tensor  # B P in 0..1
    time: Tensor  # B, into TIMES
    floor: Tensor  # B, into FLOORS
    view: Tensor  # B, into VIEWS
    elevation: Tensor  # B, radians above the horizon
    normals: Tensor  # B bool, the picture is a normal map

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, item: slice | Tensor) -> Reading:
        return Reading(**{f.name: getattr(self, f.name)[item] for f in fields(self)})

    @property
    def count(self) -> Tensor:
        """Number of objects: B."""
        return self.present.sum(1)

    @property
    def azimuth(self) -> Tensor:
        """Facing of the largest object: B radians, -pi..pi."""
        area = (self.mask.sum((2, 3)) * self.present).argmax(1, keepdim=True)
        return self.facing.gather(1, area).squeeze(1)

    @staticmethod
    def cat(parts: list[Reading]) -> Reading:
        return Reading(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Reading)})


@dataclass
class VideoReading:
    """B videos as read by the oracle."""

    motion: Tensor  # B, into MOTIONS
    motion_certainty: Tensor  # B, 0..1
    mover: Tensor  # B, the moving slot of frame 0, -1 where nothing moves by itself
    first: Reading  # frame 0
    last: Reading  # last frame

    def mover_is(self, attribute: str) -> Tensor:
        """An attribute of the moving object in frame 0, e.g. "colour": B, -1 where nothing moves."""
        value = getattr(self.first, attribute).gather(1, self.mover.clamp(min=0)[:, None]).squeeze(1)
        return value.where(self.mover >= 0, torch.full_like(value, ABSENT))


def circular_mean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Angle (radians, -pi..pi) and certainty (0..1) of a distribution over bins of the circle (... FACING_BINS)."""
    angle = torch.arange(FACING_BINS, device=logits.device) * (2 * math.pi / FACING_BINS)
    probability = logits.float().softmax(-1)
    # Round the best bin only, so that "either left or right" does not average to "front".
    near = (angle - angle[probability.argmax(-1, keepdim=True)]).cos() > math.cos(2.5 * 2 * math.pi / FACING_BINS)
    local = probability * near
    return torch.atan2((local * angle.sin()).sum(-1), (local * angle.cos()).sum(-1)), local.sum(-1)


def decode(out: dict[str, Tensor]) -> Reading:
    """Turn the network's outputs into a Reading."""
    out = {name: value.float() for name, value in out.items()}
    facing, certainty = circular_mean(out["facing"])
    style = out["style_parameters"].clone()
    for i, name in enumerate(CIRCULAR):
        x, y = out["style_circle"][:, i].unbind(-1)
        style[:, STYLE_PARAMETERS.index(name)] = torch.atan2(y, x) / (2 * math.pi) % 1
    named = out["style"].argmax(-1)
    relation = out["relation"].softmax(-1)  # the last class is "beneath" (see supervision.py)
    stacked = relation[..., RELATIONS.index("on top of")] + relation[..., -1]
    relation = torch.cat([relation[..., :-1], (1 - stacked)[..., None]], -1)
    return Reading(
        present=out["present"].squeeze(-1) > 0,
        kind=out["kind"].argmax(-1),
        colour=out["colour"].argmax(-1),
        pattern=out["pattern"].argmax(-1),
        size=out["size"].argmax(-1),
        marked=out["marked"].squeeze(-1) > 0,
        special=out["special"].squeeze(-1) > 0,
        facing=facing,
        facing_certainty=certainty,
        box=out["box"],
        mask=out["mask"] > 0,
        embedding=torch.nn.functional.normalize(out["embedding"], dim=-1),
        relation=relation,
        style=named.where(named < len(STYLES), torch.full_like(named, ABSENT)),
        style_parameters=style,
        time=out["time"].argmax(-1),
        floor=out["floor"].argmax(-1),
        view=out["view"].argmax(-1),
        elevation=out["elevation"].squeeze(-1),
        normals=out["normals"].squeeze(-1) > 0,
    )
