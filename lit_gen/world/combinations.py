"""What objects are made of: the combinations of colour, kind and pattern, and which of them are never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.world.draws import Draws
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import COLOURS, COMPOUNDS, KINDS, PATTERNS, SHAPES

SUBJECTS = 1 << 20  # subject ids below are seen in training, ids from here up to twice this are not


def combination_is_held_out(colour: Tensor, kind: Tensor, pattern: Tensor) -> Tensor:
    """The fixed hash that keeps one in eight of (colour, kind, pattern) out of training. Shapes broadcast."""
    return (3 * colour + 4 * (kind % 2) + kind // 2 + 2 * pattern) % 8 == 0


def is_held_out(scenes: Scenes) -> Tensor:
    """Which objects are never seen in training, by their combination of attributes or their subject: B K bool."""
    ordinary = (scenes.kind >= 0) & (scenes.subject < 0)
    return (scenes.subject >= SUBJECTS) | (
        ordinary & combination_is_held_out(scenes.colour, scenes.kind, scenes.pattern)
    )


def subject_kind(subject: Tensor) -> Tensor:
    """A subject's kind (one of SHAPES) is part of its identity: subject ids to kinds, any shape."""
    return (subject.clamp(min=0) * 2654435761 >> 16) % len(SHAPES)


ROLES = ("shape", "compound", "stand", "markable", "turning")
_ROLE_KINDS = {
    "shape": SHAPES,
    "compound": COMPOUNDS,
    "stand": ("cube", "cylinder"),  # flat on top
    "markable": ("ball", "cube", "cylinder", "cone"),
    "turning": ("ball", "cube", "cylinder", "cone"),
}
_PATTERN_WEIGHT = {"plain": 0.34, "striped": 0.22, "checkered": 0.22, "dotted": 0.22}


def _combination_table() -> Tensor:
    """Cumulated chances of (kind, pattern) given (seen or held out, role, colour): 2 roles 8 40."""
    colour = torch.arange(len(COLOURS))[:, None, None]
    kind = torch.arange(len(KINDS))[:, None]
    pattern = torch.arange(len(PATTERNS))
    held_out = combination_is_held_out(colour, kind, pattern)  # 8 10 4
    tables = []
    for allowed in (~held_out, held_out):
        for role in ROLES:
            weight = torch.tensor(list(_PATTERN_WEIGHT.values())).expand(len(COLOURS), len(KINDS), -1).clone()
            weight[:, [name not in _ROLE_KINDS[role] for name in KINDS]] = 0
            if role == "markable":
                weight *= torch.tensor([1.5, 1.0, 1.0, 0.6])  # a bullseye stands out least among dots
            if role == "turning":  # what is the same from all sides would not be seen to turn
                weight[:, [name != "cube" for name in KINDS], :2] = 0
            weight = (weight * allowed).flatten(1)
            tables.append(weight.cumsum(1) / weight.sum(1, keepdim=True))
    return torch.stack(tables).view(2, len(ROLES), len(COLOURS), -1)


_COMBINATIONS = _combination_table()


def distinct_colours(draws: Draws) -> Tensor:
    """Three different colours for every scene, so that a colour word singles out an object: B K."""
    first = draws.integer("colour 0", len(COLOURS))
    second = (first + 1 + draws.integer("colour 1", len(COLOURS) - 1)) % len(COLOURS)
    third = draws.integer("colour 2", len(COLOURS) - 2)
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third], 1)


def draw_combinations(draws: Draws, role: Tensor, colour: Tensor, first_held_out: bool) -> tuple[Tensor, Tensor]:
    """Kinds and patterns (each B K) for objects of given roles (into ROLES) and colours, both B K.

    Only combinations seen in training, but for object 0 only held-out ones if `first_held_out`.
    """
    held_out = torch.tensor([int(first_held_out), 0, 0], device=role.device)
    table = _COMBINATIONS.to(role.device)[held_out, role, colour]  # B K 40
    point = draws.uniforms("combination", 3)[..., None]  # B K 1
    combination = (table <= point).sum(2).clamp(max=table.shape[2] - 1)
    return combination // len(PATTERNS), combination % len(PATTERNS)


def draw_subjects(draws: Draws, held_out: bool) -> Tensor:
    """One subject id a row: B."""
    return draws.integer("id", SUBJECTS) + (SUBJECTS if held_out else 0)
