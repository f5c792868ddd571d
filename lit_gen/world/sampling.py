"""Scenes as a pure function of (recipe, split, seed, index), drawn thousands at a time on any device.

Splits share the recipe's distribution but no stream: "train" and "val" hold only seen combinations, styles and
subjects; "test" draws object 0, continuous styles and subjects only from the held-out ones.
Letters: B scenes, K = 3 object slots, P style parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_gen.world.draws import Draws, salt
from lit_gen.world.placement import BEHIND, FRONT, NEXT, TOP, TRIPLES, frame, place
from lit_gen.world.recipes import LAYOUTS, RECIPES
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import NAMED, STYLE_PARAMETERS, sample_style, style_is_held_out
from lit_gen.world.textures import PALETTE
from lit_gen.world.vocabulary import (
    ABSENT,
    COLOURS,
    COMPOUNDS,
    FLOORS,
    KINDS,
    MOTIONS,
    OBJECTS_PER_SCENE,
    PATTERNS,
    SHAPES,
    STYLES,
    TIMES,
    VIEWS,
)

SPLITS = ("train", "val", "test")
SUBJECTS = 1 << 20  # ids below are seen in training, ids from here up to twice this are not
BACKDROP = FLOORS.index("backdrop")
RADIUS = (0.36, 0.5)  # metres, of small and large objects
_SPINS, _CIRCLED = MOTIONS.index("spins"), MOTIONS.index("is circled")
_MARKABLE = ("ball", "cube", "cylinder", "cone")  # kinds with room for a bullseye on the front
_FRONTED = ("snowman", "house", "mushroom", "rocket")  # kinds whose front is seen to be one without a mark
_THIN = ("ring", "dumbbell")  # kinds that cannot be told from the side

# Camera directions that leave no doubt about a view word, degrees: |azimuth| range and elevation range.
_VIEW_RANGES = {"front": (0, 25, 0, 35), "side": (50, 78, 0, 35), "back": (130, 180, 0, 35), "above": (0, 180, 60, 76)}


def combination_is_held_out(colour: Tensor, kind: Tensor, pattern: Tensor) -> Tensor:
    """The fixed hash that keeps one in eight of (colour, kind, pattern) out of training. Shapes broadcast."""
    return (3 * colour + 4 * (kind % 2) + kind // 2 + 2 * pattern) % 8 == 0


def is_held_out(scenes: Scenes) -> Tensor:
    """Which objects are never seen in training, by their combination of attributes or their subject: B K bool."""
    ordinary = (scenes.kind >= 0) & (scenes.subject < 0)
    return (scenes.subject >= SUBJECTS) | (
        ordinary & combination_is_held_out(scenes.colour, scenes.kind, scenes.pattern)
    )


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
    plan, device = RECIPES[recipe], index.device
    salted = salt(recipe, split, seed)
    layout_index = index // plan.frame.get("layout", 1)
    draws = Draws(layout_index, salted)
    names = list(plan.layouts)
    layout = draws.choice("layout", torch.tensor(list(plan.layouts.values()), device=device))  # B

    def each(attribute: str) -> Tensor:
        """A layout's number for every scene: B, or B n."""
        return torch.tensor([getattr(LAYOUTS[name], attribute) for name in names], device=device)[layout]

    def these(attribute: str, value: str) -> Tensor:
        return torch.tensor([getattr(LAYOUTS[name], attribute) == value for name in names], device=device)[layout]

    count = draws.choice("count", each("objects")) + 1  # B
    single = count == 1
    present = torch.arange(OBJECTS_PER_SCENE, device=device) < count[:, None]  # B K
    normals = draws.chance("normals", each("normals"))

    # Style and time.
    share = each("styled")[:, None] * torch.tensor([plan.named, plan.continuous], device=device)
    style_kind = draws.choice("style kind", torch.cat([1 - share.sum(1, keepdim=True), share], 1))
    style = torch.where(style_kind == 1, 1 + draws.integer("style", len(STYLES) - 1), -(style_kind == 2).long())
    parameters = sample_style(draws.uniforms("style parameters", len(STYLE_PARAMETERS)), held_out=split == "test")
    parameters = torch.where((style < 0)[:, None], parameters, NAMED.to(device)[style.clamp(min=0)])
    moving = each("moving")
    motion = torch.where(moving, draws.integer("motion", len(MOTIONS)), -1)
    floor = torch.where(
        draws.chance("backdrop", each("backdrop")) & (motion != _CIRCLED), BACKDROP, draws.integer("floor", BACKDROP)
    )
    if "layout" in plan.frame:
        floor = torch.where(floor == BACKDROP, draws.integer("floor", BACKDROP), floor)
        time = index % len(TIMES)
    else:
        time = draws.choice("time", torch.tensor(plan.times, device=device))
    time = time.masked_fill((floor == BACKDROP) | (style != 0), 0)

    # Who stands where to whom.
    facing = draws.choice("facing", torch.tensor([0.2, 0.2, 0.17, 0.17, 0.2, 0.06], device=device))
    around = torch.where(draws.chance("around", 0.55), NEXT, TOP)
    first = torch.where(these("relations", "facing"), facing, around)
    first = first.masked_fill(these("relations", "film"), FRONT)
    both = TRIPLES.to(device)[draws.integer("both", len(TRIPLES))]  # B 2
    relation = torch.full_like(present, ABSENT, dtype=torch.long)
    relation[:, 0] = torch.where(count == 3, both[:, 0], first).masked_fill(single, ABSENT)
    relation[:, 2] = both[:, 1].masked_fill(count < 3, ABSENT)
    anchor = torch.where(relation >= 0, 1, ABSENT)

    # What they are.
    subjects = draws.chance("subject", each("subject"))  # B
    marked = draws.chance("marked", each("marked")) & ~subjects
    turning = (motion == _SPINS) | (motion == _CIRCLED)
    stacked = (relation[:, 0] == TOP)[:, None] & (torch.arange(OBJECTS_PER_SCENE, device=device) == 1)
    role = torch.stack([draws.chance(f"compound {k}", each("compound")) for k in range(OBJECTS_PER_SCENE)], 1).long()
    role = role.masked_fill(stacked, _ROLES.index("stand"))
    role[:, 0] = role[:, 0].masked_fill(turning, _ROLES.index("turning"))
    role[:, 0] = role[:, 0].masked_fill(marked, _ROLES.index("markable"))
    colour = _distinct_colours(draws)
    table = _COMBINATIONS.to(device)[(torch.arange(3, device=device) < int(split == "test")).long(), role, colour]
    point = draws.uniforms("combination", 3)[..., None]  # B K 1
    combination = (table <= point).sum(2).clamp(max=len(KINDS) * len(PATTERNS) - 1)
    kind, pattern = combination // len(PATTERNS), combination % len(PATTERNS)

    subject_draws = Draws(index // plan.frame.get("subject", 1), salt(recipe, split, seed, "subjects"))
    subject = torch.full_like(kind, ABSENT)
    subject[:, 0] = torch.where(
        subjects, subject_draws.integer("id", SUBJECTS) + (SUBJECTS if split == "test" else 0), ABSENT
    )
    kind[:, 0] = torch.where(subjects, subject_kind(subject[:, 0]), kind[:, 0])

    size = (draws.uniforms("size", 3) < 0.6).long()
    # Who stands behind is not the smaller one, and who stands on top not the larger one.
    larger = torch.where(relation == BEHIND, 1, 0) * size[:, 1:2]
    smaller = ((relation == FRONT) | (relation == TOP)).long() * (1 - size[:, 1:2])
    size = torch.where(larger > 0, 1, torch.where(smaller > 0, 0, size))
    radius = torch.tensor(RADIUS, device=device)[size] * (0.94 + 0.12 * draws.uniforms("radius", 3))
    kind = kind.masked_fill(~present, ABSENT)

    # The camera.
    azimuth, elevation = _look(draws, these, each)
    thin = _among(kind[:, 0], _THIN) & single & these("camera", "round")
    half_turns = (azimuth / math.pi).round() * math.pi
    azimuth = torch.where(thin, half_turns + (azimuth - half_turns) * (50 / 90), azimuth)
    elevation = torch.where(thin, elevation * 0.6, elevation)
    in_depth = ((relation == BEHIND) | (relation == FRONT)).any(1) & ~moving
    elevation = torch.where(in_depth, elevation.clamp(min=math.radians(25)), elevation)
    fov = draws.uniform("fov", math.radians(38), math.radians(50))
    tangent = (fov / 2).tan()
    fill = torch.where(
        single,
        torch.where(size[:, 0] == 1, draws.uniform("fill", 0.54, 0.66), draws.uniform("fill", 0.38, 0.46)),
        draws.uniform("fill", 0.84, 0.92),
    )
    fill = torch.where(moving, draws.uniform("fill", 0.34, 0.42), fill)
    # A camera below the horizon stays above the floor.
    elevation = torch.maximum(elevation, -(0.8 * fill * tangent).asin())
    position = place(draws, kind, radius, relation, azimuth)
    framed = torch.where(moving[:, None], kind.where(torch.arange(3, device=device) == 0, ABSENT), kind)
    distance, target = frame(draws, framed, radius, position, azimuth, elevation, tangent, fill)
    target[:, 2] = torch.where(moving, target[:, 2] + 0.1 * distance * tangent, target[:, 2])  # headroom for jumps

    upright = marked | ~these("camera", "front")
    yaw = (draws.uniforms("yaw", 3) - 0.5) * math.radians(56)
    yaw[:, 0] = yaw[:, 0].masked_fill(upright, 0)
    yaw = yaw.masked_fill(~these("camera", "front")[:, None] | ~present, 0)
    readable = single & (yaw[:, 0] == 0) & (marked | _among(kind[:, 0], _FRONTED)) & ~normals & ~moving
    view = torch.where(readable, _plain_view(azimuth, elevation), ABSENT)

    ordinary = present & (subject < 0)
    return Scenes(
        index=index,
        kind=kind,
        colour=colour.masked_fill(~ordinary, ABSENT),
        pattern=pattern.masked_fill(~ordinary, ABSENT),
        size=size.masked_fill(~present, ABSENT),
        radius=radius.masked_fill(~present, 0),
        marked=torch.cat([marked[:, None], torch.zeros_like(present[:, 1:])], 1),
        subject=subject,
        position=position.masked_fill(~present[..., None], 0),
        yaw=yaw,
        relation=relation,
        anchor=anchor,
        floor=floor,
        backdrop=_backdrop(draws, colour, ordinary),
        time=time,
        azimuth=azimuth,
        elevation=elevation,
        distance=distance,
        fov=fov,
        target=target,
        view=view,
        style=style,
        style_parameters=parameters,
        normals=normals,
        motion=motion,
        mover=torch.zeros_like(motion),
        speed=torch.where(moving, draws.uniform("speed", 0.8, 1.2), 1.0),
    )


def subject_kind(subject: Tensor) -> Tensor:
    """A subject's kind (one of SHAPES) is part of its identity: subject ids to kinds, any shape."""
    return (subject.clamp(min=0) * 2654435761 >> 16) % len(SHAPES)


_ROLES = ("shape", "compound", "stand", "markable", "turning")
_ROLE_KINDS = {
    "shape": SHAPES,
    "compound": COMPOUNDS,
    "stand": ("cube", "cylinder"),  # flat on top
    "markable": _MARKABLE,
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
        for role in _ROLES:
            weight = torch.tensor(list(_PATTERN_WEIGHT.values())).expand(len(COLOURS), len(KINDS), -1).clone()
            weight[:, [name not in _ROLE_KINDS[role] for name in KINDS]] = 0
            if role == "markable":
                weight *= torch.tensor([1.5, 1.0, 1.0, 0.6])  # a bullseye stands out least among dots
            if role == "turning":  # what is the same from all sides would not be seen to turn
                weight[:, [name != "cube" for name in KINDS], :2] = 0
            weight = (weight * allowed).flatten(1)
            tables.append(weight.cumsum(1) / weight.sum(1, keepdim=True))
    return torch.stack(tables).view(2, len(_ROLES), len(COLOURS), -1)


_COMBINATIONS = _combination_table()


def _distinct_colours(draws: Draws) -> Tensor:
    """Three different colours for every scene, so that a colour word singles out an object: B K."""
    first = draws.integer("colour 0", len(COLOURS))
    second = (first + 1 + draws.integer("colour 1", len(COLOURS) - 1)) % len(COLOURS)
    third = draws.integer("colour 2", len(COLOURS) - 2)
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third], 1)


def _look(draws: Draws, these, each) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """Azimuth and elevation of the cameras (B, radians)."""
    sign = torch.where(draws.chance("azimuth sign", 0.5), 1.0, -1.0)
    low, high = each("elevation").unbind(1)
    elevation = draws.uniform("elevation", low, high)
    azimuth = torch.where(
        these("camera", "front"), draws.uniform("azimuth", -20.0, 20.0), draws.uniform("azimuth", -180.0, 180.0)
    )
    ranges = torch.tensor(list(_VIEW_RANGES.values()), device=sign.device, dtype=torch.float32)
    near, far, bottom, top = ranges[draws.integer("view", len(VIEWS))].unbind(1)
    chosen = these("camera", "view")
    azimuth = torch.where(chosen, sign * draws.uniform("view azimuth", near, far), azimuth)
    elevation = torch.where(chosen, draws.uniform("elevation", bottom, top), elevation)
    return azimuth * (math.pi / 180), elevation * (math.pi / 180)


def _plain_view(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """The view word where there is no doubt about it, else -1."""
    turned, raised = _wrap(azimuth).abs() * (180 / math.pi), elevation * (180 / math.pi)
    word = torch.full_like(azimuth, ABSENT, dtype=torch.long)
    word = word.masked_fill(turned <= 28, 0).masked_fill((turned >= 48) & (turned <= 80), 1)
    word = word.masked_fill(turned >= 125, 2).masked_fill(raised > 42, ABSENT)
    return word.masked_fill(raised >= 58, 3)


def _backdrop(draws: Draws, colour: Tensor, shown: Tensor) -> Tensor:
    """A muted background colour unlike every object's: the best of four candidates, B 3 in 0..1."""
    base, tint = draws.uniforms("backdrop value", 4), draws.uniforms("backdrop tint", 12).view(-1, 4, 3)
    candidates = (0.25 + 0.7 * base)[..., None] * (1 - 0.4 * tint)  # B 4 3
    palette = PALETTE.sqrt().to(colour.device)[colour]  # B K 3, as displayed
    apart = (candidates[:, :, None] - palette[:, None]).norm(dim=3).masked_fill(~shown[:, None], 2.0)  # B 4 K
    best = apart.amin(2).argmax(1)
    return candidates[torch.arange(len(best), device=best.device), best]


def _among(kind: Tensor, names: tuple[str, ...]) -> Tensor:
    return torch.isin(kind, torch.tensor([KINDS.index(name) for name in names], device=kind.device))


def _wrap(angle: Tensor) -> Tensor:
    """Radians into -pi..pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


__all__ = ["SPLITS", "combination_is_held_out", "is_held_out", "sample", "style_is_held_out", "subject_kind", "view_of"]
