"""Captions of scenes at several levels of detail, each with the facts it states.

Levels: "full" says everything that can be seen; "partial" leaves attributes out at random; "short" names the objects;
"mixed" is what generators are trained on, mostly full with some partial and short ones; "medium" and "long" have less
and more than full; "elementary", "intermediate" and "university" say the same as full in other words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lit_gen.world import phrases
from lit_gen.world.draws import Draws, salt
from lit_gen.world.phrases import BOOKS, STANDARD, PhraseBook
from lit_gen.world.sampling import view_of
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import KEEPS_COLOUR
from lit_gen.world.vocabulary import (
    COLOURS,
    FLOORS,
    KINDS,
    MOTIONS,
    OBJECTS_PER_SCENE,
    PATTERNS,
    RELATIONS,
    SIZES,
    STYLES,
    TIMES,
    VIEWS,
)

LEVELS = ("full", "partial", "short", "medium", "long", "elementary", "intermediate", "university", "mixed")


@dataclass(frozen=True)
class Caption:
    """A sentence and what it states.

    facts: "objects" maps slot to the stated attributes of that object; "relations" lists (slot, relation, slot);
    "view", "floor", "time", "style", "motion" and "normals" are there when said. All in words of `vocabulary`, but
    "style" is "stylised" for a style without a name.
    """

    text: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Chances:
    """How often each part of a scene is put into words, at one level."""

    colour: float = 1.0
    pattern: float = 1.0
    size: float = 0.3
    marked: float = 1.0
    relation: float = 1.0
    view: float = 0.8
    floor: float = 0.5
    time: float = 0.9
    day: float = 0.08


_PARTIAL = _Chances(
    colour=0.7, pattern=0.5, size=0.1, marked=0.7, relation=0.8, view=0.5, floor=0.25, time=0.6, day=0.0
)
_SHORT = _Chances(colour=0, pattern=0, size=0, marked=0, relation=0, view=0, floor=0, time=0, day=0)
_REGISTER = _Chances(size=0.5, floor=1, time=1, day=0.5)
_CHANCES = {
    "full": _Chances(),
    "partial": _PARTIAL,
    "short": _SHORT,
    "medium": _Chances(pattern=0, size=0, marked=0, view=0.5, floor=0, time=0, day=0),
    "long": _Chances(size=1, floor=1, time=1, day=1, view=1),
    "elementary": _REGISTER,
    "intermediate": _REGISTER,
    "university": _REGISTER,
}
_MIXED = ((0.8, "full"), (0.92, "partial"), (1.0, "short"))
_HIDES_PATTERN = ("ink sketch", "neon", "blueprint")  # styles that leave little of patterns
_HIDES_FLOOR = ("ink sketch", "neon", "blueprint", "poster", "chalk")

_DRAWS = 40  # uniforms per caption


class _Speaker:
    """Says one scene: `scene` holds its attributes as plain numbers and lists, `uniforms` what chance decides."""

    def __init__(self, scene: dict[str, Any], uniforms: list[float], level: str) -> None:
        self.scene, self.uniforms, self.next = scene, uniforms, 0
        if level == "mixed":
            point = self._uniform()
            level = next(name for limit, name in _MIXED if point < limit)
        self.chances, self.book = _CHANCES[level], BOOKS.get(level, STANDARD)
        self.facts: dict[str, Any] = {"objects": {}, "relations": []}
        self.count = sum(kind >= 0 for kind in scene["kind"])
        self.moves = scene["motion"] >= 0
        # What a picture does not show is said less often, but prompts with it stay familiar.
        style = scene["style"]
        name = STYLES[style] if style >= 0 else ""
        self.shows_colour = 0.25 if scene["normals"] else 1.0 if not name or KEEPS_COLOUR[style] else 0.5
        self.shows_pattern = 0.0 if scene["normals"] else 0.3 if name in _HIDES_PATTERN else 1.0
        self.shows_floor = 0.3 if name in _HIDES_FLOOR else 1.0 if name else 0.5

    def _uniform(self) -> float:
        self.next += 1
        return self.uniforms[self.next - 1]

    def _says(self, chance: float) -> bool:
        return self._uniform() < chance

    def _pick(self, wordings: tuple[str, ...]) -> str:
        """One wording; the first is said as often as all others together."""
        if len(wordings) == 1:
            return wordings[0]
        point = self._uniform() * 2 - 1
        return wordings[0] if point < 0 else wordings[1 + int(point * (len(wordings) - 1))]

    def caption(self, style_words: bool, place_words: bool) -> Caption:
        # "an artwork of" stands before a noun, so what moves is then "a red ball that moves left".
        self.prefixed = style_words and self.moves and self.scene["style"] < 0
        text = self._what()
        for part in (self._place(), self._time()) if place_words else ():
            text = f"{text} {part}" if part else text
        view = self._view()
        text = f"{text}, {view}" if view else text
        return Caption(self._styled(text) if style_words else self._normals(text), self.facts)

    def _object(self, slot: int) -> str:
        """ "a large red striped ball with a painted spot"."""
        scene, chances, book = self.scene, self.chances, self.book
        stated: dict[str, Any] = {"kind": KINDS[scene["kind"][slot]]}
        words = []
        sizes = {size for size in scene["size"] if size >= 0}
        # Size shows next to an object of another size, or in how much of the picture a lone still object takes.
        chance = chances.size if len(sizes) > 1 else chances.size * 0.5 if self.count == 1 and not self.moves else 0
        if self._says(chance):
            stated["size"] = SIZES[scene["size"][slot]]
            words.append(self._pick(book.size[stated["size"]]))
        if scene["subject"][slot] >= 0:
            stated["subject"] = True
            words.append(self._pick(book.subject))
        else:
            if self._says(chances.colour * self.shows_colour):
                stated["colour"] = COLOURS[scene["colour"][slot]]
                words.append(self._pick(book.colour[stated["colour"]]))
            pattern = PATTERNS[scene["pattern"][slot]]
            if self._says(chances.pattern * self.shows_pattern):
                stated["pattern"] = pattern
                if pattern != "plain":
                    words.append(self._pick(book.pattern[pattern]))
        words.append(self._pick(book.kind[stated["kind"]]))
        self.facts["objects"][slot] = stated
        text = with_article(" ".join(words))
        if scene["marked"][slot] and not scene["normals"] and self._says(chances.marked):
            stated["marked"] = True
            text = f"{text} {self._pick(book.marked)}"
        return text

    def _again(self, slot: int) -> str:
        """ "the red ball": an object already spoken of."""
        stated = self.facts["objects"][slot]
        colour = [self.book.colour[stated["colour"]][0]] if "colour" in stated else []
        return " ".join(["the", *colour, self.book.kind[stated["kind"]][0]])

    def _relation(self, slot: int) -> str:
        relation = RELATIONS[self.scene["relation"][slot]]
        self.facts["relations"].append((slot, relation, self.scene["anchor"][slot]))
        return self._pick(self.book.relation[relation])

    def _what(self) -> str:
        """The objects, their relations and what moves."""
        scene = self.scene
        slots = [slot for slot in range(OBJECTS_PER_SCENE) if scene["kind"][slot] >= 0]
        if self.moves:
            return self._motion(slots, MOTIONS[scene["motion"]])
        said = {slot: self._object(slot) for slot in slots}
        if self.count == 1:
            return said[0]
        related = [slot for slot in slots if scene["relation"][slot] >= 0 and self._says(self.chances.relation)]
        stands = self._pick(self.book.stands)
        stands = f" {stands} " if stands else " "
        if 0 in related and self.count == 2:
            return f"{said[0]}{stands}{self._relation(0)} {said[1]}"
        if related == [0, 2]:
            first = f"{said[0]}{stands}{self._relation(0)} {said[1]}"
            return f"{first}, and {said[2]}{stands}{self._relation(2)} {self._again(1)}"
        if self.count == 2:
            return f"{said[0]} and {said[1]}"
        return f"{said[0]}, {said[1]} and {said[2]}"

    def _motion(self, slots: list[int], motion: str) -> str:
        mover = self.scene["mover"]
        self.facts["motion"], self.facts["mover"] = motion, mover
        said = self._object(mover)
        text = self._pick(self.book.motion[motion]).format(f"{said} that" if self.prefixed else said)
        for slot in slots:
            if slot == mover or not self._says(self.chances.relation):
                continue
            if self.scene["relation"][mover] >= 0 and self.scene["anchor"][mover] == slot:
                text = f"{text} {self._relation(mover)} {self._object(slot)}"
        return text

    def _place(self) -> str:
        floor = FLOORS[self.scene["floor"]]
        if not self._says(self.chances.floor * self.shows_floor):
            return ""
        self.facts["floor"] = floor
        return self._pick(self.book.floor[floor])

    def _time(self) -> str:
        time = TIMES[self.scene["time"]]
        by_day = time == "day"
        if (
            not self._says(self.chances.day if by_day else self.chances.time)
            or FLOORS[self.scene["floor"]] == "backdrop"
        ):
            return ""
        self.facts["time"] = time
        return self._pick(self.book.time[time])

    def _view(self) -> str:
        """The view word: always true, said less often where it cannot be read off the picture."""
        scene = self.scene
        if self.count > 1 or scene["view word"] < 0:
            return ""
        if not self._says(self.chances.view if scene["view"] >= 0 else self.chances.view / 2):
            return ""
        view = VIEWS[scene["view word"]]
        self.facts["view"] = view
        return self._pick(self.book.view[view])

    def _normals(self, text: str) -> str:
        if not self.scene["normals"]:
            return text
        self.facts["normals"] = True
        return self._pick(phrases.NORMALS).format(text)

    def _styled(self, text: str) -> str:
        style = self.scene["style"]
        if self.scene["normals"]:
            return self._normals(text)
        if style == 0:
            if self.moves or not self._says(0.4):
                return text
            self.facts["style"] = "photo"
            return self._pick(phrases.PHOTO).format(text)
        if style < 0:
            self.facts["style"] = "stylised"
            return self._pick(phrases.UNNAMED).format(text)
        self.facts["style"] = STYLES[style]
        wordings = phrases.NAMED[:1] if self.moves else phrases.NAMED
        wording = self._pick(wordings) % STYLES[style]
        return (wording if wording.startswith("{}") else with_article(wording)).format(text)


def captions(
    scenes: Scenes, level: str = "full", style_words: bool = True, seed: int = 0, place_words: bool = True
) -> list[Caption]:
    """Say B scenes at a level (one of LEVELS), with or without words for the style and for floor and time of day.

    Another `seed` gives other paraphrases and, below "full", other omissions. Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"no caption level named {level!r}; there are {', '.join(LEVELS)}")
    # Part of the key is the scene itself: equal indices of different recipes shall not be worded alike.
    scene_bits = scenes.azimuth.float().contiguous().view(torch.int32).long()
    draws = Draws(scenes.index * 0x1000003 + scene_bits, salt("captions", level, seed))
    uniforms = draws.uniforms("wording", _DRAWS).tolist()
    columns = {f.name: getattr(scenes, f.name).tolist() for f in fields(scenes) if f.name in _SPOKEN}
    columns["view word"] = _view_words(scenes).tolist()
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [_Speaker(row, u, level).caption(style_words, place_words) for row, u in zip(rows, uniforms, strict=True)]


_SPOKEN = {
    "kind", "colour", "pattern", "size", "marked", "subject", "relation", "anchor", "floor", "time", "view", "style",
    "normals", "motion", "mover",
}  # fmt: skip


def _view_words(scenes: Scenes) -> Tensor:
    """The view word that is true of a still scene whose object 0 faces straight ahead on a backdrop, else -1: B."""
    word = torch.where(scenes.view >= 0, scenes.view, view_of(scenes.azimuth, scenes.elevation))
    turntable = (scenes.floor == FLOORS.index("backdrop")) & (scenes.yaw[:, 0] == 0) & (scenes.motion < 0)
    return torch.where((scenes.view >= 0) | turntable, word, -1)


def with_article(text: str) -> str:
    """ "a red ball", "an orange ball"."""
    return f"an {text}" if text[0] in "aeiou" and not text.startswith("uni") else f"a {text}"


_NAMES = "|".join(re.escape(name) for name in STYLES[1:])
_STYLE_PATTERNS = (
    re.compile(r"^a photo of "),
    re.compile(r"^(?:an artwork|a stylised picture) of "),
    re.compile(rf"^an? (?:{_NAMES}) picture of "),
    re.compile(rf", in (?:{_NAMES}) style$"),
)


def strip_style(text: str) -> str:
    """A caption without the words that tell its style (a photo, an artwork, a named style)."""
    for pattern in _STYLE_PATTERNS:
        text = pattern.sub("", text)
    return text


def vocabulary_words() -> list[str]:
    """All words the grammar can emit, lower case and sorted."""
    wordings: list[str] = ["a an and the of", *phrases.PHOTO, *phrases.NORMALS, *phrases.UNNAMED, *STYLES]
    wordings += [wording.replace("%s", "") for wording in phrases.NAMED]
    for book in (STANDARD, *BOOKS.values()):
        for f in fields(PhraseBook):
            value = getattr(book, f.name)
            groups = value.values() if isinstance(value, dict) else [value]
            wordings += [wording for group in groups for wording in group]
    return sorted({word for wording in wordings for word in re.findall(r"[a-z]+", wording.lower())})
