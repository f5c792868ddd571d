"""Scenes as a pure function of (recipe, split, seed, index), drawn thousands at a time on any device.

Splits share the recipe's distribution but no stream: "train" and "val" hold only seen combinations, styles and
subjects; "test" draws object 0, continuous styles and subjects only from the held-out ones.
Letters: B scenes, K = 3 object slots, P style parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_gen.world.combinations import (
    ROLES,
    SUBJECTS,
    combination_is_held_out,
    distinct_colours,
    draw_combinations,
    draw_subjects,
    is_held_out,
    subject_kind,
)
from lit_gen.world.draws import Draws, salt
from lit_gen.world.placement import BEHIND, FRONT, NEXT, TOP, TRIPLES, camera_axes, frame, place
from lit_gen.world.recipes import LAYOUTS, RECIPES, Recipe
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import NAMED, STYLE_PARAMETERS, sample_style, style_is_held_out
from lit_gen.world.textures import PALETTE
from lit_gen.world.vocabulary import ABSENT, FLOORS, KINDS, MOTIONS, OBJECTS_PER_SCENE, STYLES, VIEWS

SPLITS = ("train", "val", "test")
BACKDROP = FLOORS.index("backdrop")
RADIUS = (0.37, 0.5)  # metres, of small and large objects
_SPINS, _CIRCLED = MOTIONS.index("spins"), MOTIONS.index("is circled")
_FRONTED = ("snowman", "house", "mushroom", "rocket")  # kinds whose front is seen to be one without a mark
_THIN = ("ring", "dumbbell")  # kinds that cannot be told from the side

# Camera directions that leave no doubt about a view word, degrees: |azimuth| range and elevation range.
_VIEW_RANGES = {"front": (0, 25, 0, 35), "side": (50, 78, 0, 35), "back": (130, 180, 0, 35), "above": (0, 80, 60, 74)}

# How often object 0 of a pair is left of, right of, behind, in front of, on top of, next to object 1.
_RELATION_WEIGHTS = (0.2, 0.2, 0.17, 0.17, 0.2, 0.06)


def view_of(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """The view word (into VIEWS) for any camera, for prompts that depend on it: front, side, back or above.

    azimuth, elevation: B, radians. Bands follow what is seen of a mark on the front: near the middle (within 40
    degrees), at the edge (to 95 degrees), not at all; from above 52 degrees up it is "above".
    """
    turned = _wrap(azimuth).abs()
    word = torch.where(turned <= math.radians(40), 0, torch.where(turned <= math.radians(95), 1, 2))
    return torch.where(elevation >= math.radians(52), 3, word)


def sample(recipe: str, split: str, seed: int, index: Tensor) -> Scenes:
    """Draw scenes number `index` (B integers, any device) of a recipe.

    Raises KeyError for an unknown recipe, ValueError for an unknown split.
    """
    if recipe not in RECIPES:
        raise KeyError(f"no recipe named {recipe!r}; there are {', '.join(RECIPES)}")
    if split not in SPLITS:
        raise ValueError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
    plan = RECIPES[recipe]
    drawn = _Draw(plan, split == "test", index, salt(recipe, split, seed))
    look, objects = drawn.look(), drawn.objects()
    return Scenes(index=index, **drawn.arrange(look, objects))


class _Draw:
    """The steps of drawing B scenes of one recipe; every step reads only named uniforms, so their order is free."""

    def __init__(self, plan: Recipe, held_out: bool, index: Tensor, salted: int) -> None:
        self.plan, self.held_out, self.index, self.device = plan, held_out, index, index.device
        # Consecutive scenes may share all but the time, the place, or the subject.
        self.draws = Draws(index // plan.shared.get("layout", 1), salt("scene", salted))
        self.place_draws = Draws(index // plan.shared.get("place", 1), salt("place", salted))
        self.subject_draws = Draws(index // plan.shared.get("subject", 1), salt("subject", salted))
        if "layout" in plan.shared:
            self.place_draws = self.draws
        self.layout = self.draws.choice("layout", torch.tensor(list(plan.layouts.values()), device=self.device))
        self.count = self.draws.choice("count", self.each("objects")) + 1  # B
        self.single = self.count == 1
        self.present = torch.arange(OBJECTS_PER_SCENE, device=self.device) < self.count[:, None]  # B K
        self.moving = self.each("moving")
        self.motion = torch.where(self.moving, self._motions(), -1)

    def each(self, attribute: str) -> Tensor:
        """A number of every scene's layout: B, or B n."""
        return torch.tensor([getattr(LAYOUTS[name], attribute) for name in self.plan.layouts], device=self.device)[
            self.layout
        ]

    def has(self, attribute: str, value: str) -> Tensor:
        """Whether a word of every scene's layout is `value`: B bool."""
        return torch.tensor(
            [getattr(LAYOUTS[name], attribute) == value for name in self.plan.layouts], device=self.device
        )[self.layout]

    def _motions(self) -> Tensor:
        motions = torch.tensor([MOTIONS.index(name) for name in self.plan.motions], device=self.device)
        if "place" not in self.plan.shared:
            return motions[self.draws.integer("motion", len(motions))]
        # Scenes of one place show different motions: entries of one permutation.
        order = self.place_draws.uniforms("motions", len(motions)).argsort(1)
        return motions[order.gather(1, (self.index % self.plan.shared["place"] % len(motions))[:, None])[:, 0]]

    def look(self) -> dict[str, Tensor]:
        """Style, floor, time of day and whether the picture is a normal map."""
        draws, place_draws, plan = self.draws, self.place_draws, self.plan
        share = self.each("styled")[:, None] * torch.tensor([plan.named, plan.continuous], device=self.device)
        chosen = draws.choice("style kind", torch.cat([1 - share.sum(1, keepdim=True), share], 1))
        style = torch.where(chosen == 1, 1 + draws.integer("style", len(STYLES) - 1), -(chosen == 2).long())
        unnamed = sample_style(draws.uniforms("style parameters", len(STYLE_PARAMETERS)), held_out=self.held_out)
        bare = torch.zeros_like(self.single) if "layout" in plan.shared else self.motion != _CIRCLED
        backdrop = place_draws.chance("backdrop", self.each("backdrop")) & bare  # time of day needs a floor
        floor = torch.where(backdrop, BACKDROP, place_draws.integer("floor", BACKDROP))
        time = place_draws.choice("time", torch.tensor(plan.times, device=self.device))
        if "layout" in plan.shared:
            time = self.index % plan.shared["layout"]
        return {
            "style": style,
            "style_parameters": torch.where((style < 0)[:, None], unnamed, NAMED.to(self.device)[style.clamp(min=0)]),
            "floor": floor,
            "time": time.masked_fill((floor == BACKDROP) | (style != 0), 0),
            "normals": draws.chance("normals", self.each("normals")),
        }

    def objects(self) -> dict[str, Tensor]:
        """What the objects are and how they stand to one another."""
        draws, present = self.draws, self.present
        slots = torch.arange(OBJECTS_PER_SCENE, device=self.device)
        first = draws.choice("facing", torch.tensor(_RELATION_WEIGHTS, device=self.device))
        around = torch.where(draws.chance("around", 0.55), NEXT, TOP)
        first = torch.where(self.has("relations", "round"), around, first)
        first = first.masked_fill(self.has("relations", "film"), FRONT)
        both = TRIPLES.to(self.device)[draws.integer("both", len(TRIPLES))]  # B 2
        relation = torch.full_like(present, ABSENT, dtype=torch.long)
        relation[:, 0] = torch.where(self.count == 3, both[:, 0], first).masked_fill(self.single, ABSENT)
        relation[:, 2] = both[:, 1].masked_fill(self.count < 3, ABSENT)

        special = draws.chance("subject", self.each("subject"))  # B
        marked = draws.chance("marked", self.each("marked")) & ~special
        turning = (self.motion == _SPINS) | (self.motion == _CIRCLED)
        stand = (relation[:, :1] == TOP) & (slots == 1)
        role = (draws.uniforms("compound", OBJECTS_PER_SCENE) < self.each("compound")[:, None]).long()
        role = role.masked_fill(stand, ROLES.index("stand"))
        role = role.masked_fill(turning[:, None] & (slots == 0), ROLES.index("turning"))
        role = role.masked_fill(marked[:, None] & (slots == 0), ROLES.index("markable"))
        colour = distinct_colours(draws)
        kind, pattern = draw_combinations(draws, role, colour, self.held_out)
        subject = torch.where(
            special[:, None] & (slots == 0), draw_subjects(self.subject_draws, self.held_out)[:, None], ABSENT
        )
        kind = torch.where(subject >= 0, subject_kind(subject), kind)

        size = (draws.uniforms("size", 3) < 0.6).long()
        # Who stands behind is not the smaller one; who stands in front or on top not the larger one.
        size = torch.where(relation == BEHIND, torch.maximum(size, size[:, 1:2]), size)
        size = torch.where((relation == FRONT) | (relation == TOP), torch.minimum(size, size[:, 1:2]), size)
        radius = torch.tensor(RADIUS, device=self.device)[size] * (0.94 + 0.12 * draws.uniforms("radius", 3))
        ordinary = present & (subject < 0)
        return {
            "kind": kind.masked_fill(~present, ABSENT),
            "colour": colour.masked_fill(~ordinary, ABSENT),
            "pattern": pattern.masked_fill(~ordinary, ABSENT),
            "size": size.masked_fill(~present, ABSENT),
            "radius": radius.masked_fill(~present, 0),
            "marked": marked[:, None] & (slots == 0),
            "subject": subject,
            "relation": relation,
            "anchor": torch.where(relation >= 0, 1, ABSENT),
        }

    def arrange(self, look: dict[str, Tensor], objects: dict[str, Tensor]) -> dict[str, Tensor]:
        """All attributes: the given ones, where the objects stand and where the camera is."""
        draws, moving, single = self.draws, self.moving, self.single
        kind, radius, relation = objects["kind"], objects["radius"], objects["relation"]
        ahead = self.has("camera", "front")
        azimuth, elevation = self._direction()
        thin = _among(kind[:, 0], _THIN) & single & self.has("camera", "round")
        half_turns = (azimuth / math.pi).round() * math.pi
        azimuth = torch.where(thin, half_turns + (azimuth - half_turns) * (50 / 90), azimuth)
        elevation = torch.where(thin, elevation * 0.6, elevation)
        in_depth = ((relation == BEHIND) | (relation == FRONT)).any(1) & ~moving
        elevation = torch.where(in_depth, elevation.clamp(min=math.radians(25)), elevation)
        fov = self.place_draws.uniform("fov", math.radians(38), math.radians(50))
        tangent = (fov / 2).tan()
        fill = self._fill(objects["size"])
        position = place(draws, kind, radius, relation, azimuth)
        position = torch.where(moving[:, None, None], position * 1.2, position)  # room to grow
        # View words need fronts that face ahead; elsewhere objects are turned a little.
        yaw = (draws.uniforms("yaw", 3) - 0.5) * math.radians(56)
        yaw = yaw.masked_fill(~ahead[:, None] | ~self.present | objects["marked"], 0)
        framed = kind.masked_fill(moving[:, None] & (torch.arange(3, device=self.device) > 0), ABSENT)
        axes = camera_axes(azimuth, elevation)
        distance, target = frame(framed, radius, position, yaw, axes, fill * tangent)
        # The picture is shifted within the room that is left; movers stand a little low and need the room themselves.
        shift = (0.9 - fill).clamp(min=0)[:, None] * (draws.uniforms("shift", 2) - 0.5)  # B 2, in half pictures
        shift = torch.where(moving[:, None], 0.3 * shift + torch.tensor([0.0, 0.22], device=self.device), shift)
        target = target + ((shift * (distance * tangent)[:, None])[..., None] * axes[:, :2]).sum(1)

        # A camera that looks up stays above the floor.
        lowest = ((0.1 - target[:, 2]) / distance).clamp(-1, 1).asin()
        elevation = torch.maximum(elevation, lowest)

        fronted = objects["marked"][:, 0] | _among(kind[:, 0], _FRONTED)
        readable = single & (yaw[:, 0] == 0) & fronted & ~look["normals"] & ~moving
        return {
            **look,
            **objects,
            "position": position.masked_fill(~self.present[..., None], 0),
            "yaw": yaw,
            "backdrop": _backdrop(self.place_draws, objects["colour"]),
            "azimuth": azimuth,
            "elevation": elevation,
            "distance": distance,
            "fov": fov,
            "target": target,
            "view": torch.where(readable, _plain_view(azimuth, elevation), ABSENT),
            "motion": self.motion,
            "mover": torch.zeros_like(self.motion),
            "speed": torch.where(moving, draws.uniform("speed", 0.8, 1.2), 1.0),
        }

    def _direction(self) -> tuple[Tensor, Tensor]:
        """Azimuth and elevation of the cameras (B, radians)."""
        draws, degree = self.place_draws, math.pi / 180
        low, high = self.each("elevation").unbind(1)
        elevation = draws.uniform("elevation", low, high)
        reach = torch.where(self.has("camera", "front"), 20.0, 180.0)
        azimuth = draws.uniform("azimuth", -reach, reach)
        ranges = torch.tensor(list(_VIEW_RANGES.values()), device=self.device, dtype=torch.float32)
        near, far, bottom, top = ranges[draws.integer("view", len(VIEWS))].unbind(1)
        sign = torch.where(draws.chance("azimuth sign", 0.5), 1.0, -1.0)
        chosen = self.has("camera", "view")
        azimuth = torch.where(chosen, sign * draws.uniform("view azimuth", near, far), azimuth)
        elevation = torch.where(chosen, draws.uniform("view elevation", bottom, top), elevation)
        return azimuth * degree, elevation * degree

    def _fill(self, size: Tensor) -> Tensor:
        """How much of the picture the objects take: B. A single object's size word shows in it."""
        large, small = self.draws.uniform("fill", 0.55, 0.66), self.draws.uniform("fill", 0.4, 0.48)
        fill = torch.where(size[:, 0] == 1, large, small)
        fill = torch.where(self.single, fill, self.draws.uniform("fill", 0.88, 0.95))
        return torch.where(self.moving, self.draws.uniform("fill", 0.34, 0.42), fill)


def _plain_view(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """The view word where there is no doubt about it, else -1."""
    turned, raised = _wrap(azimuth).abs() * (180 / math.pi), elevation * (180 / math.pi)
    word = torch.full_like(azimuth, ABSENT, dtype=torch.long)
    word = word.masked_fill(turned <= 28, 0).masked_fill((turned >= 48) & (turned <= 80), 1)
    word = word.masked_fill(turned >= 125, 2).masked_fill(raised > 42, ABSENT)
    return word.masked_fill(raised >= 58, 3)


def _backdrop(draws: Draws, colour: Tensor) -> Tensor:
    """A muted background colour unlike every object's: the best of four candidates, B 3 in 0..1."""
    base, tint = draws.uniforms("backdrop value", 4), draws.uniforms("backdrop tint", 12).view(-1, 4, 3)
    candidates = (0.25 + 0.7 * base)[..., None] * (1 - 0.4 * tint)  # B 4 3
    palette = PALETTE.sqrt().to(colour.device)[colour.clamp(min=0)]  # B K 3, as displayed
    apart = (candidates[:, :, None] - palette[:, None]).norm(dim=3).masked_fill((colour < 0)[:, None], 2.0)  # B 4 K
    best = apart.amin(2).argmax(1)
    return candidates[torch.arange(len(best), device=best.device), best]


def _among(kind: Tensor, names: tuple[str, ...]) -> Tensor:
    return torch.isin(kind, torch.tensor([KINDS.index(name) for name in names], device=kind.device))


def _wrap(angle: Tensor) -> Tensor:
    """Radians into -pi..pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


__all__ = [
    "SPLITS",
    "SUBJECTS",
    "combination_is_held_out",
    "is_held_out",
    "sample",
    "style_is_held_out",
    "subject_kind",
    "view_of",
]
