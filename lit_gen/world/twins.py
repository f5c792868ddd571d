"""Scenes that differ from given ones in a single fact, for captions that are wrong in one word.

Contrastive training meets captions of other scenes, which differ in many facts at once, and so never has to tell left
from right. A caption of the twin, in the same wording, is the negative that it has to be told apart from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.world.draws import Draws, salt
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import COLOURS, MOTIONS, PATTERNS, RELATIONS

# left of <-> right of, behind <-> in front of; what is on top of or next to the other is turned into "left of"
_OPPOSITE = torch.tensor([RELATIONS.index(r) for r in ("right of", "left of", "in front of", "behind")] + [0, 0])


def twins(scenes: Scenes, seed: int = 0) -> Scenes:
    """The B scenes, each with one fact changed that captions state; for captions only, they were never laid out.

    Changed is, at random among what a scene has: the direction of its relations, its motion, the colours of two
    objects against each other, or the colour or the pattern of one object.
    """
    draws = Draws(scenes.index, salt("twins", seed))
    ordinary = (scenes.kind >= 0) & (scenes.subject < 0)
    related = (scenes.relation >= 0).any(1)
    moving = scenes.motion >= 0
    coloured = scenes.colour >= 0
    pair = (
        ordinary[:, 0] & ordinary[:, 1] & coloured[:, 0] & coloured[:, 1] & (scenes.colour[:, 0] != scenes.colour[:, 1])
    )
    single = ordinary[:, 0] & coloured[:, 0]
    patterned = single & (scenes.pattern[:, 0] >= 0)
    possible = torch.stack([related * 3.0, moving * 3.0, pair * 1.0, single * 1.0, patterned * 1.0], 1)
    change = draws.choice("change", possible + 1e-6)

    relation = _OPPOSITE.to(scenes.relation.device)[scenes.relation.clamp(min=0)]
    relation = relation.where((scenes.relation >= 0) & (change == 0)[:, None], scenes.relation)
    motion = _other(scenes.motion, len(MOTIONS), draws, "motion").where(moving & (change == 1), scenes.motion)
    swapped = scenes.colour[:, [1, 0, 2]]
    recoloured = _first(scenes.colour, _other(scenes.colour[:, 0], len(COLOURS), draws, "colour"))
    repatterned = _first(scenes.pattern, _other(scenes.pattern[:, 0], len(PATTERNS), draws, "pattern"))
    colour = swapped.where((pair & (change == 2))[:, None], scenes.colour)
    colour = recoloured.where((single & (change == 3))[:, None], colour)
    pattern = repatterned.where((patterned & (change == 4))[:, None], scenes.pattern)
    return scenes.replace(relation=relation, motion=motion, colour=colour, pattern=pattern)


def _other(value: Tensor, count: int, draws: Draws, name: str) -> Tensor:
    """Another of `count` values, B from B."""
    return (value + 1 + draws.integer(name, count - 1)) % count


def _first(values: Tensor, first: Tensor) -> Tensor:
    """values B K with the first column replaced."""
    return torch.cat([first[:, None], values[:, 1:]], 1)
