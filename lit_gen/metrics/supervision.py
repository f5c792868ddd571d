"""What the oracle is taught: targets from Scenes and instance maps, the best order of slots, and the losses.

Everything is batched tensor arithmetic on the device of the scenes: no loop over pictures and no host sync.
Letters: B images, K = 3 objects, H W = 64 pixels, P style parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.metrics.network import FACING_BINS
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import CIRCULAR, KEEPS_COLOUR, STYLE_PARAMETERS, visibility
from lit_gen.world.vocabulary import COMPOUNDS, KINDS, OBJECTS_PER_SCENE, RELATIONS, STYLES

LEGIBLE_PIXELS = 24  # smaller objects are not taught; they are judged from 60 on (evaluate.py)
FRONTED = tuple(name in COMPOUNDS for name in KINDS)  # kinds with a front of their own
DRAWS_PATTERN = tuple(name not in ("ink sketch", "neon", "blueprint") for name in STYLES)
# The relation head has no use for "next to", which says nothing of direction: its place is taken by "beneath".
LEFT, RIGHT, BEHIND, FRONT, TOP, BENEATH = range(len(RELATIONS))
INVERSE = (RIGHT, LEFT, FRONT, BEHIND, BENEATH, TOP)
_LINEAR = tuple(i for i, name in enumerate(STYLE_PARAMETERS) if name not in CIRCULAR)
_AROUND = tuple(i for i, name in enumerate(STYLE_PARAMETERS) if name in CIRCULAR)

WEIGHTS = {
    "present": 1.0,
    "mask": 2.0,
    "dice": 1.0,
    "box": 4.0,
    "kind": 1.0,
    "colour": 1.0,
    "pattern": 1.0,
    "size": 0.3,
    "marked": 0.5,
    "special": 0.3,
    "facing": 0.4,
    "subject": 0.3,
    "relation": 0.5,
    "style": 0.5,
    "style_linear": 6.0,
    "style_circle": 3.0,
    "time": 0.5,
    "floor": 0.3,
    "view": 0.5,
    "normals": 0.3,
    "elevation": 1.0,
}


@dataclass
class Targets:
    """Truth in the oracle's terms; -1 (or False in a mask) marks what cannot be told from the picture."""

    present: Tensor  # B K bool
    kind: Tensor  # B K
    colour: Tensor  # B K
    pattern: Tensor  # B K
    size: Tensor  # B K
    marked: Tensor  # B K bool
    mark_shows: Tensor  # B K bool, whether there is a mark can be told
    special: Tensor  # B K bool
    subject: Tensor  # B K, -1 for ordinary objects
    facing: Tensor  # B K radians
    faced: Tensor  # B K bool, facing can be told
    legible: Tensor  # B K bool
    mask: Tensor  # B K H W float
    box: Tensor  # B K 4
    relation: Tensor  # B K K
    style: Tensor  # B, the last class for styles without a name
    style_parameters: Tensor  # B P
    time: Tensor  # B
    floor: Tensor  # B
    view: Tensor  # B
    normals: Tensor  # B bool
    elevation: Tensor  # B radians


@cache
def all_orders(device: torch.device) -> Tensor:
    """The 3! orders of slots, 6 K, brought to a device once."""
    return torch.tensor(list(permutations(range(OBJECTS_PER_SCENE))), device=device)


def _lookup(table: tuple, index: Tensor) -> Tensor:
    """table[index] for a constant table, built without waiting for the device."""
    out = torch.zeros_like(index, dtype=torch.bool if isinstance(table[0], bool) else index.dtype)
    for i, value in enumerate(table):
        out = out.masked_fill(index == i, value)
    return out


def facing(scenes: Scenes) -> Tensor:
    """Angle of the camera round each object from that object's front: B K radians, growing anticlockwise from above."""
    flat = scenes.distance * scenes.elevation.cos()
    camera = scenes.target[:, :2] + flat[:, None] * torch.stack([scenes.azimuth.sin(), -scenes.azimuth.cos()], -1)
    x, y = (camera[:, None] - scenes.position[..., :2]).unbind(-1)
    return torch.atan2(x, -y) - scenes.yaw


def colour_shows(scenes: Scenes) -> Tensor:
    """B K bool: the colour's name can be told from the picture (see `KEEPS_COLOUR`)."""
    kept = _lookup(KEEPS_COLOUR, scenes.style) | (scenes.style < 0)
    return (kept & ~scenes.normals)[:, None] & (scenes.subject < 0) & (scenes.kind >= 0)


def pattern_shows(scenes: Scenes) -> Tensor:
    """B K bool: the pattern can be told from the picture; three named styles leave it out or nearly so."""
    drawn = _lookup(DRAWS_PATTERN, scenes.style) | (scenes.style < 0)
    return (drawn & ~scenes.normals)[:, None] & (scenes.subject < 0) & (scenes.kind >= 0)


def size_shows(scenes: Scenes) -> Tensor:
    """B K bool: the size's name can be told from the picture: next to an object of another size, or in how much of the
    picture a lone still object takes (as captions have it); else the camera is as far away as the objects need."""
    there = scenes.kind >= 0
    count, large = there.sum(1), (scenes.size == 1).sum(1)
    differ = (large > 0) & (large < count)
    return there & (differ | ((count == 1) & (scenes.motion < 0)))[:, None]


def boxes(mask: Tensor) -> Tensor:
    """Centre and size of masks (... H W float 0 or 1) as fractions of the picture: ... 4."""
    parts = []
    for along in (-2, -1):  # columns (x), then rows (y)
        line = mask.amax(along)
        n = line.shape[-1]
        at = torch.arange(n, device=mask.device, dtype=mask.dtype)
        first = (at + n * (1 - line)).amin(-1).clamp(max=n - 1)
        last = (at - n * (1 - line)).amax(-1).clamp(min=0) + 1
        parts.append(((first + last) / (2 * n), (last - first).clamp(min=0) / n))
    (x, width), (y, height) = parts
    return torch.stack([x, y, width, height], -1)


def relations(scenes: Scenes) -> Tensor:
    """B K K: how object i stands to object j, into the relation head's classes; -1 where nothing was said.

    Said of (i, j) it is also known of (j, i). Objects "next to" one another are left and right of each other in the
    picture, whichever way the camera looks.
    """
    k = OBJECTS_PER_SCENE
    said = (scenes.relation >= 0) & (scenes.anchor >= 0) & (scenes.kind >= 0)
    pair = F.one_hot(scenes.anchor.clamp(min=0), k).bool() & said[..., None]  # B i j
    x, y = scenes.position[..., 0], scenes.position[..., 1]
    lateral = x * scenes.azimuth.cos()[:, None] + y * scenes.azimuth.sin()[:, None]  # towards the camera's right
    side = torch.where(lateral > lateral.gather(1, scenes.anchor.clamp(min=0)), RIGHT, LEFT)
    known = side.where(scenes.relation == BENEATH, scenes.relation)  # "next to" has that index in scenes
    there = pair * (known[..., None] + 1)  # 0 for none
    back = pair * (_lookup(INVERSE, known)[..., None] + 1)
    return torch.maximum(there, back.transpose(1, 2)) - 1


def targets(scenes: Scenes, instance: Tensor) -> Targets:
    """Truth for pictures of `scenes` with instance maps B 64 64 (0 background, k + 1 object k)."""
    slots = torch.arange(1, OBJECTS_PER_SCENE + 1, device=instance.device)
    mask = (instance[:, None] == slots[None, :, None, None]).float()
    pixels = mask.sum((2, 3))
    present = scenes.kind >= 0
    legible = present & (pixels >= LEGIBLE_PIXELS)
    special = scenes.subject >= 0
    coloured = colour_shows(scenes)
    plain = ~scenes.normals
    angle = facing(scenes)
    absent = torch.full_like(scenes.kind, -1)
    named = torch.where(scenes.style >= 0, scenes.style, torch.full_like(scenes.style, len(STYLES)))
    nothing = torch.full_like(scenes.style, -1)
    return Targets(
        present=present & (pixels > 0),
        kind=scenes.kind.where(legible, absent),
        colour=scenes.colour.where(legible & coloured, absent),
        pattern=scenes.pattern.where(legible & plain[:, None] & ~special, absent),
        size=scenes.size.where(legible & size_shows(scenes), absent),
        marked=scenes.marked,
        mark_shows=legible & plain[:, None] & ~(scenes.marked & (angle.cos() < -0.2)),
        special=special,
        subject=scenes.subject.where(legible & plain[:, None], absent),
        facing=angle,
        faced=legible & plain[:, None] & ~special & (scenes.marked | _lookup(FRONTED, scenes.kind)),
        legible=legible & plain[:, None],
        mask=mask,
        box=boxes(mask),
        relation=relations(scenes),
        style=named.where(plain, nothing),
        style_parameters=scenes.style_parameters,
        time=scenes.time.where(plain, nothing),
        floor=scenes.floor.where(plain, nothing),
        view=scenes.view,
        normals=scenes.normals,
        elevation=scenes.elevation,
    )


def _select(logits: Tensor, target: Tensor) -> Tensor:
    """-log p of every object's class under every slot: logits B Q n, target B K -> B Q K, 0 where target is -1."""
    log = logits.float().log_softmax(-1)
    picked = log.gather(-1, target.clamp(min=0)[:, None].expand(-1, log.shape[1], -1))
    return -picked * (target >= 0)[:, None]


@torch.no_grad()
def match(out: dict[str, Tensor], truth: Targets) -> Tensor:
    """The slot of each object under the cheapest of the 3! orders: B K."""
    present = truth.present.float()
    logit = out["present"].float()  # B Q 1
    cost = F.softplus(torch.where(truth.present[:, None], -logit, logit))  # B Q K
    guess, mask = out["mask"].float().sigmoid().flatten(2), truth.mask.flatten(2)
    overlap = torch.einsum("bqn,bkn->bqk", guess, mask)
    dice = 1 - 2 * overlap / (guess.sum(-1)[..., None] + mask.sum(-1)[:, None] + 1)
    cost = cost + present[:, None] * 4 * dice
    cost = cost + _select(out["kind"], truth.kind) + _select(out["colour"], truth.colour)
    orders = all_orders(cost.device)
    total = sum(cost[:, orders[:, k], k] for k in range(OBJECTS_PER_SCENE))  # B 6
    return orders[total.argmin(1)]


def arrange(value: Tensor, order: Tensor) -> Tensor:
    """Slots in the order of objects: value B Q ..., order B K -> B K ..."""
    return value[torch.arange(len(value), device=value.device)[:, None], order]


def _mean(loss: Tensor, valid: Tensor) -> Tensor:
    valid = valid.to(loss.dtype)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def _columns(x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """x[:, columns] without sending the indices to the device at every step."""
    return torch.stack([x[:, i] for i in columns], 1)


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the last axis, averaged where target >= 0."""
    target = target.flatten()
    return _mean(F.cross_entropy(logits.float().flatten(0, -2), target.clamp(min=0), reduction="none"), target >= 0)


def _binary(logit: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logit.float().squeeze(-1), target.float(), reduction="none")
    return _mean(loss, valid)


def losses(out: dict[str, Tensor], truth: Targets, order: Tensor) -> dict[str, Tensor]:
    """Named scalar losses, unweighted (see WEIGHTS). "subject" is added by the trainer, which owns the proxies."""
    slot = {name: arrange(out[name], order) for name in ("kind", "colour", "pattern", "size", "marked", "special")}
    seen = truth.present
    loss = {name: _classes(slot[name], getattr(truth, name)) for name in ("kind", "colour", "pattern", "size")}
    loss["present"] = _binary(arrange(out["present"], order), truth.present, torch.ones_like(seen))
    loss["marked"] = _binary(slot["marked"], truth.marked, truth.mark_shows)
    loss["special"] = _binary(slot["special"], truth.special, truth.legible)

    guess = arrange(out["mask"], order).float()
    loss["mask"] = F.binary_cross_entropy_with_logits(guess, truth.mask)
    soft, mask = guess.sigmoid().flatten(2), truth.mask.flatten(2)
    loss["dice"] = _mean(1 - (2 * (soft * mask).sum(-1) + 1) / (soft.sum(-1) + mask.sum(-1) + 1), seen)
    loss["box"] = _mean((arrange(out["box"], order).float() - truth.box).abs().mean(-1), seen)

    # Soft labels over neighbouring bins, so that the mean of the bins is finer than a bin.
    angle = torch.arange(FACING_BINS, device=guess.device) * (2 * math.pi / FACING_BINS)
    soft_bins = (40 * ((truth.facing[..., None] - angle).cos() - 1)).softmax(-1)
    log = arrange(out["facing"], order).float().log_softmax(-1)
    loss["facing"] = _mean(-(soft_bins * log).sum(-1), truth.faced)

    related = arrange(arrange(out["relation"], order).transpose(1, 2), order).transpose(1, 2)
    loss["relation"] = _classes(related, truth.relation)
    for name in ("style", "time", "floor", "view"):
        loss[name] = _classes(out[name], getattr(truth, name))
    plain = ~truth.normals
    loss["normals"] = _binary(out["normals"], truth.normals, torch.ones_like(plain))
    loss["elevation"] = F.smooth_l1_loss(out["elevation"].float().squeeze(-1), truth.elevation, beta=0.1)

    shown = visibility(truth.style_parameters) * plain[:, None]
    off = (out["style_parameters"].float() - truth.style_parameters).abs()
    loss["style_linear"] = _mean(_columns(off, _LINEAR), _columns(shown, _LINEAR))
    turn = 2 * math.pi * _columns(truth.style_parameters, _AROUND)
    point = torch.stack([turn.cos(), turn.sin()], -1)
    loss["style_circle"] = _mean((out["style_circle"].float() - point).abs().sum(-1), _columns(shown, _AROUND))
    return loss
