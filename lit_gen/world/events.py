"""Event scripts: consecutive clips of one place, each with its own actor and motion, and stories that tell them.

A story knows which events it tells, so the set of scripts that fit it is exact. Levels are those of `grammar.LEVELS`:
"full" and the three registers tell every clip, "partial" a run of neighbouring clips, "long", "medium" and "short"
summarise ever more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lit_gen.world.draws import Draws, salt
from lit_gen.world.grammar import LEVELS, Caption, captions, with_article
from lit_gen.world.phrases import BOOKS, STANDARD
from lit_gen.world.recipes import EVENT_CLIPS
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import FLOORS, KINDS, TIMES


@dataclass
class Events:
    """One script: its clips in order, and a long caption of each."""

    scenes: Scenes  # B = clips
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


# What clips are told with at each level: the caption level of one clip.
_CLIP_LEVEL = {"partial": "full", "long": "medium", "medium": "medium", "mixed": "full"}


def sample_events(split: str, seed: int, index: int, clips: int = 6) -> Events:
    """Script number `index`: `clips` clips of one place with different motions.

    Raises ValueError if `clips` is not in 1..EVENT_CLIPS.
    """
    if not 1 <= clips <= EVENT_CLIPS:
        raise ValueError(f"an event script has 1 to {EVENT_CLIPS} clips, not {clips}")
    scenes = sample("events", split, seed, index * EVENT_CLIPS + torch.arange(clips))
    return Events(scenes, [caption.text for caption in captions(scenes, "long")])


def tell(events: Events, level: str = "full", seed: int = 0) -> Caption:
    """The story of a script at a level; facts: "events", a list of (clip, facts of that clip), "floor" and "time".

    "partial" tells one to three neighbouring clips, "long" every clip without detail, "medium" two clips; "short" names
    who moves there (facts: "cast" and "floor"). Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"no caption level named {level!r}; there are {', '.join(LEVELS)}")
    draws = Draws(events.scenes.index[:1], salt("story", level, seed))
    chosen = list(range(len(events)))
    if level == "partial":
        count = 1 + int(draws.integer("count", min(3, len(chosen))))
        start = int(draws.integer("start", len(chosen) - count + 1))
        chosen = chosen[start : start + count]
    elif level == "medium":
        chosen = sorted(draws.uniforms("main", len(chosen)).argsort(1)[0, :2].tolist())
    book = BOOKS.get(level, STANDARD)
    floor, time = FLOORS[events.scenes.floor[0]], TIMES[events.scenes.time[0]]
    if level == "short":
        cast = list(dict.fromkeys(KINDS[kind] for kind in events.scenes.kind[:, 0].tolist()))
        text = f"{_listed([with_article(kind) for kind in cast])} {book.floor[floor][0]}"
        return Caption(text, {"cast": cast, "floor": floor})
    told = captions(events.scenes[torch.tensor(chosen)], _CLIP_LEVEL.get(level, level), False, seed, place_words=False)
    facts: dict[str, Any] = {"events": [(clip, one.facts) for clip, one in zip(chosen, told, strict=True)]}
    first, middle, last = book.joints
    joints = [first, *[middle] * (len(told) - 2), last] if len(told) > 1 else [""]
    story = "; ".join(f"{joint} {one.text}".strip() for joint, one in zip(joints, told, strict=True))
    if level == "medium":
        return Caption(story, facts)
    return Caption(f"{book.floor[floor][0]} {book.time[time][0]}: {story}", {**facts, "floor": floor, "time": time})


def _listed(names: list[str]) -> str:
    """ "a ball, a cube and a ring" """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
