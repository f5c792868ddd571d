"""Which videos fit a description: exactly, by what it states.

What a description states is {"events": [{attribute: [values it allows]}], "order": "all" | "some", "floor": [values],
"time": [values]}; what it leaves out is free. "all": these are the events of the video, one by one. "some": they happen
in it in this order, perhaps with others between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_gen.world.stories.script import MOST
from lit_gen.world.vocabulary import COLOURS, FLOORS, KINDS, MOTIONS, PATTERNS, TIMES

_EVENT = {"kind": KINDS, "colour": COLOURS, "pattern": PATTERNS, "motion": MOTIONS, "other": KINDS}
_PLACE = {"floor": FLOORS, "time": TIMES}


def fits(stated: dict[str, Any], truth: dict[str, Any]) -> bool:
    """Whether a video is as stated."""
    if any(truth[name] not in stated[name] for name in _PLACE if name in stated):
        return False
    happened = truth["events"]
    if stated["order"] == "all":
        if len(happened) != len(stated["events"]):
            return False
        return all(map(_matches, stated["events"], happened))
    following = iter(happened)
    return all(any(_matches(event, one) for one in following) for event in stated["events"])


def _matches(event: dict[str, list[str]], one: dict[str, Any]) -> bool:
    return all(one[name] in allowed for name, allowed in event.items())


class Gallery:
    """N videos' truths as arrays, to ask of all at once what `fits` asks of one."""

    def __init__(self, truths: Sequence[dict[str, Any]]) -> None:
        self.lengths = np.array([len(truth["events"]) for truth in truths])
        self.place = {name: _codes([truth[name] for truth in truths], words) for name, words in _PLACE.items()}  # N
        self.events = {}  # N MOST, -1 where there is no event, or none with this attribute
        for name, words in _EVENT.items():
            table = np.full((len(truths), MOST), -1)
            for row, truth in zip(table, truths, strict=True):
                row[: len(truth["events"])] = _codes([event[name] for event in truth["events"]], words)
            self.events[name] = table
        self.there = np.arange(MOST) < self.lengths[:, None]

    def fits(self, stated: dict[str, Any]) -> np.ndarray:
        """Which videos are as stated: N bool."""
        good = np.ones(len(self.lengths), bool)
        for name, words in _PLACE.items():
            if name in stated:
                good &= np.isin(self.place[name], _codes(stated[name], words))
        if stated["order"] == "all":
            good &= self.lengths == len(stated["events"])
        earliest = np.zeros(len(good), int)  # where the next event may be
        for number, event in enumerate(stated["events"]):
            where = self.there.copy()
            for name, allowed in event.items():
                where &= np.isin(self.events[name], _codes(allowed, _EVENT[name]))
            if stated["order"] == "all":
                good &= where[:, number] if number < MOST else False
                continue
            where &= np.arange(MOST) >= earliest[:, None]
            good &= where.any(1)
            earliest = where.argmax(1) + 1
        return good


def _codes(values: Sequence[str | None], words: Sequence[str]) -> np.ndarray:
    return np.array([-1 if value is None else words.index(value) for value in values])
