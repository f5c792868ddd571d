"""Does a picture show what its scene says? Readings compared with Scenes, whatever order the objects are found in.

Letters: B images, K = 3 objects of the scene, Q = 3 slots of the reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.metrics.reading import Reading
from lit_gen.metrics.supervision import all_orders, arrange, colour_shows, pattern_shows
from lit_gen.world.grammar import Caption
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import ABSENT, FLOORS, OBJECTS_PER_SCENE, RELATIONS, VIEWS

_NEXT = RELATIONS.index("next to")  # the last one
OBJECT_ATTRIBUTES = ("shape", "colour", "pattern", "marked", "relation")
PICTURE_ATTRIBUTES = ("count", "view", "style", "photo", "time", "normals", "all")
ATTRIBUTES = OBJECT_ATTRIBUTES + PICTURE_ATTRIBUTES
# How much each attribute counts when objects are paired with slots: the shape first.
_PAIRING = {"shape": 4.0, "colour": 3.0, "pattern": 2.0, "marked": 1.0, "relation": 1.0}


@dataclass
class Agreement:
    """For each attribute, what was right and what counted; shape B K for objects, B for pictures."""

    right: dict[str, Tensor]
    counted: dict[str, Tensor]
    slot: Tensor  # B K, the slot each object was found in

    def accuracy(self, name: str) -> Tensor:
        """Share of what counted that was right (nan if nothing counted)."""
        return (self.right[name] & self.counted[name]).sum() / self.counted[name].sum()


def relation_holds(reading: Reading, slot: Tensor, anchor: Tensor, relation: Tensor) -> Tensor:
    """Whether slot (B K) stands in `relation` (B K) to slot `anchor` (B K): B K bool.

    "Next to" says nothing of direction, so it holds unless one object stands on the other, and where a direction is
    asked for, it is not among the answers.
    """
    rows = torch.arange(len(slot), device=slot.device)[:, None]
    probability = reading.relation[rows, slot, anchor]  # B K 6
    direction = probability[..., :_NEXT].argmax(-1)
    return torch.where(relation == _NEXT, probability[..., _NEXT] > 0.5, direction == relation)


def compare(reading: Reading, scenes: Scenes, order: Tensor | None = None, legible: Tensor | None = None) -> Agreement:
    """Compare readings with the scenes they should show.

    Counted are: shape, pattern (ordinary objects where the style draws them), colour (where the style keeps colours),
    marked (where a view word tells that the front could be seen) and relation, as the scene has them; per
    picture count, view (where it has a word), style (named ones but photo), photo, time (of photos with a floor),
    normals, and "all": everything that counted is right.

    Args:
        reading: of B pictures.
        scenes: B scenes.
        order: the slot of each object (B K); by default objects are paired with slots in the order that agrees best.
        legible: objects (B K bool) that count; all by default.
    """
    there = scenes.kind >= 0
    if legible is not None:
        there = there & legible
    frontal = (scenes.view >= 0) & (scenes.view != VIEWS.index("back"))
    anchored = there & (scenes.relation >= 0) & (scenes.anchor >= 0)
    counted = {
        "shape": there,
        "colour": there & colour_shows(scenes) & (scenes.colour >= 0),
        "pattern": there & pattern_shows(scenes) & (scenes.pattern >= 0),
        "marked": there & (frontal & ~scenes.normals)[:, None],
        "relation": anchored & there.gather(1, scenes.anchor.clamp(min=0)),
    }
    if order is not None:
        right = _object_answers(reading, scenes, order)
    else:
        order, right = _best_order(reading, scenes, counted)

    plain = ~scenes.normals
    counted |= {
        "count": torch.ones_like(plain),
        "view": scenes.view >= 0,
        "style": plain & (scenes.style > 0),
        "photo": plain & (scenes.style == 0),
        "time": plain & (scenes.time >= 0) & (scenes.style == 0) & (scenes.floor != FLOORS.index("backdrop")),
        "normals": torch.ones_like(plain),
    }
    right |= {
        "count": reading.count == (scenes.kind >= 0).sum(1),
        "view": reading.view == scenes.view,
        "style": reading.style == scenes.style,
        "photo": reading.style == 0,
        "time": reading.time == scenes.time,
        "normals": reading.normals == scenes.normals,
    }
    every = torch.ones_like(plain)
    for name, value in right.items():
        good = value | ~counted[name]
        every = every & (good if good.dim() == 1 else good.all(1))
    right["all"], counted["all"] = every, torch.ones_like(plain)
    return Agreement(right, counted, order)


def as_stated(scenes: Scenes, captions: list[Caption]) -> Scenes:
    """The scenes as far as their captions (B) tell: what is unsaid is -1 (marks: False), so that it does not count.

    The style stays: a caption that names none asks for a photo. A view word counts where the picture can show it.
    """
    device, slots = scenes.kind.device, range(OBJECTS_PER_SCENE)
    objects = [[c.facts["objects"].get(k, {}) for k in slots] for c in captions]
    related = [[any(r[0] == k for r in c.facts["relations"]) for k in slots] for c in captions]

    def known(value: Tensor, said: list) -> Tensor:
        return value.where(torch.tensor(said, device=device), torch.full_like(value, ABSENT))

    def attribute(name: str) -> list[list[bool]]:
        return [[name in stated for stated in row] for row in objects]

    return scenes.replace(
        **{name: known(getattr(scenes, name), attribute(name)) for name in ("kind", "colour", "pattern", "size")},
        marked=scenes.marked & torch.tensor(attribute("marked"), device=device),
        relation=known(scenes.relation, related),
        view=known(scenes.view, ["view" in c.facts for c in captions]),
        time=known(scenes.time, ["time" in c.facts for c in captions]),
        floor=known(scenes.floor, ["floor" in c.facts for c in captions]),
    )


def _object_answers(reading: Reading, scenes: Scenes, slot: Tensor) -> dict[str, Tensor]:
    """What is right about each object if object k is in slot[:, k]: name -> B K bool."""
    found = arrange(reading.present, slot)
    names = {"shape": "kind", "colour": "colour", "pattern": "pattern", "marked": "marked"}
    right = {n: found & (arrange(getattr(reading, a), slot) == getattr(scenes, a)) for n, a in names.items()}
    anchor = scenes.anchor.clamp(min=0)
    holds = relation_holds(reading, slot, slot.gather(1, anchor), scenes.relation)
    return right | {"relation": found & found.gather(1, anchor) & holds}


def _best_order(reading: Reading, scenes: Scenes, counted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The order of slots, of all 3!, in which most is right, and what is right in it."""
    orders = all_orders(reading.kind.device)
    answers = [_object_answers(reading, scenes, order.expand(len(reading), -1)) for order in orders]
    scores = [sum(w * (a[n] & counted[n]).sum(1) for n, w in _PAIRING.items()) for a in answers]
    best = torch.stack(scores, 1).argmax(1)  # B
    rows = torch.arange(len(best), device=best.device)
    return orders[best], {n: torch.stack([a[n] for a in answers], 1)[rows, best] for n in _PAIRING}
