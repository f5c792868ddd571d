"""Everything that may be said of a script, at every level, with what it states (see `truth`).

Levels cross two axes (A Video is Worth 10,000 Words, table 1). Duration: "full" tells the whole video, "partial" one to
three neighbouring events of it. Each is told as it is, summarised ("full-short", "full-medium", "full-long") or in
other words ("full-elementary", "full-intermediate", "full-university").
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lit_gen.world.draws import salt
from lit_gen.world.grammar import with_article
from lit_gen.world.phrases import PhraseBook
from lit_gen.world.stories.script import Script
from lit_gen.world.stories.words import HYPERNYMS, REGISTERS, SEEN_FRAMES, UNSEEN, UNSEEN_FRAMES, Frames

DURATIONS = ("full", "partial")
SUMMARIES = ("short", "medium", "long")
REGISTER_LEVELS = ("elementary", "intermediate", "university")
LEVELS = tuple(
    f"{duration}-{how}" if how else duration for duration in DURATIONS for how in ("", *SUMMARIES, *REGISTER_LEVELS)
)
WORDINGS = ("seen", "words", "templates")  # as in training; unseen words; unseen sentence frames
_UNSEEN_SHARE = 0.5  # of the words that have an unseen synonym


@dataclass(frozen=True)
class Telling:
    """A description: its text, what it states, and which events (first, last + 1) it was made from."""

    level: str
    text: str
    states: dict[str, Any]
    span: tuple[int, int]
    wording: str = "seen"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"level": self.level, "text": self.text, "states": self.states, "span": list(self.span)} | (
            {} if self.wording == "seen" else {"wording": self.wording}
        )


def axis_of(level: str) -> str:
    """The axis on which a level differs from the full paragraph; of a crossed level the second."""
    how = level.partition("-")[2]
    return "summarization" if how in SUMMARIES else "simplification" if how else "duration"


def tell(script: Script, level: str, seed: int = 0, wording: str = "seen") -> Telling:
    """Describe a script; the same content in every wording. Raises ValueError for an unknown level or wording."""
    if level not in LEVELS or wording not in WORDINGS:
        raise ValueError(f"no level {level!r} or wording {wording!r}; levels: {', '.join(LEVELS)}")
    duration, _, how = level.partition("-")
    chance = random.Random(salt("content", script.index, duration, how, seed))
    span = _span(script, duration, chance)
    states = _content(script.truth, span, duration, how, chance)
    return Telling(level, say(states, how, salt("words", script.index, level, seed), wording), states, span, wording)


def paraphrases(telling: Telling, count: int, seed: int = 0) -> list[str]:
    """Other texts that state the same and no more, each in another register: what a query can be expanded by."""
    how = telling.level.partition("-")[2]
    if how in REGISTER_LEVELS:
        others = [other for other in ("", *REGISTER_LEVELS) if other != how]
        return [say(telling.states, other, salt("again", telling.text, seed, i)) for i, other in enumerate(others)][
            :count
        ]
    others = [name for name in REGISTERS if name != "standard"]
    return [
        say(telling.states, how, salt("again", telling.text, seed, i), register=name) for i, name in enumerate(others)
    ][:count]


# -- what is stated ---------------------------------------------------------------------------------------------------


def _span(script: Script, duration: str, chance: random.Random) -> tuple[int, int]:
    count = len(script.truth["events"])
    if duration == "full":
        return 0, count
    length = 1 + int(chance.random() * 3)
    first = int(chance.random() * (count - length + 1))
    return first, first + length


def _content(
    truth: dict[str, Any], span: tuple[int, int], duration: str, how: str, chance: random.Random
) -> dict[str, Any]:
    events = truth["events"][slice(*span)]
    whole, summary = duration == "full", how in SUMMARIES
    place = {name: [truth[name]] for name in ("floor", "time")} if whole and how != "medium" else {}
    if how in ("short", "medium"):
        main = sorted(range(len(events)), key=lambda _: chance.random())[: 1 if how == "short" else 2]
        events = [events[i] for i in sorted(main)]
    names: tuple[str, ...] = ("kind", "colour", "pattern", "motion", "other")
    if summary:  # the shorter a summary, the less it says of each thing; of part of a video there is less to say
        names = ("kind", "motion") if whole and how != "medium" else ("kind", "colour", "motion")
    stated = [{name: [event[name]] for name in names if _is_said(name, event[name])} for event in events]
    if how == "elementary":
        for event in stated:
            word = next((word for word, kinds in HYPERNYMS.items() if event["kind"][0] in kinds), None)
            if word and chance.random() < 0.5:
                event["kind"] = list(HYPERNYMS[word])
    return {"events": stated, "order": "all" if whole and how not in ("short", "medium") else "some", **place}


def _is_said(name: str, value: str | None) -> bool:
    return value is not None and (name, value) != ("pattern", "plain")


# -- how it is said ---------------------------------------------------------------------------------------------------


def say(states: dict[str, Any], how: str, seed: int, wording: str = "seen", register: str | None = None) -> str:
    """Put into words what is stated.

    Args:
        how: the level without its duration: "" or a register for sentences, or a summary.
        seed: of the choice among paraphrases.
        wording: one of WORDINGS.
        register: of the words; by default the level's own.
    """
    register = register or (how if how in REGISTER_LEVELS else "standard")
    frames = UNSEEN_FRAMES if wording == "templates" else SEEN_FRAMES[register]
    return _Speaker(REGISTERS[register], frames, wording == "words", random.Random(seed)).say(states, how)


class _Speaker:
    def __init__(self, book: PhraseBook, frames: Frames, unseen: bool, chance: random.Random) -> None:
        self.book, self.frames, self.unseen, self.chance = book, frames, unseen, chance

    def say(self, states: dict[str, Any], how: str) -> str:
        place = self._place(states)
        if how == "short":
            said = ", ".join(self._event(event, article=False) for event in states["events"])
            return f"{said} {place}".strip()
        clauses = [self._event(event) for event in states["events"]]
        if how in ("medium", "long"):
            said = clauses[0]
            if how == "medium" and len(clauses) == 2:
                said = self._pick(self.frames.linked).format(*clauses)
            elif how == "long":
                said = ", ".join(clauses)
            return f"{said} {place}".strip()
        sentences = [
            self._pick(frame).format(clause) for frame, clause in zip(self._joints(states), clauses, strict=True)
        ]
        if place:
            opening = self._pick(self.frames.place).format(
                floor=self._word("floor", states), time=self._word("time", states)
            )
            sentences = [*sentences, opening] if self.frames.place_last else [opening, *sentences]
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)

    def _joints(self, states: dict[str, Any]) -> list[tuple[str, ...]]:
        count, frames = len(states["events"]), self.frames
        if states["order"] == "all":
            return [frames.first, *[frames.middle] * (count - 2), frames.last]
        return [("{}",), *[frames.middle] * (count - 1)]  # part of a video is not said to begin or end it

    def _event(self, event: dict[str, list[str]], article: bool = True) -> str:
        """ "a red striped ball in front of a cube jumps" """
        words = [self._value(name, event) for name in ("colour", "pattern", "kind") if name in event]
        what = " ".join(words)
        what = with_article(what) if article else what
        if "other" in event:
            what = f"{what} {self._pick(self.book.relation['in front of'])} {with_article(self._value('other', event))}"
        return self._value("motion", event).format(what)

    def _value(self, name: str, event: dict[str, list[str]]) -> str:
        allowed = event[name]
        if len(allowed) > 1:
            return next(word for word, kinds in HYPERNYMS.items() if list(kinds) == allowed)
        column = "kind" if name == "other" else name
        unseen = self.unseen and column in ("kind", "colour", "motion") and self.chance.random() < _UNSEEN_SHARE
        return self._pick(getattr(UNSEEN if unseen else self.book, column)[allowed[0]])

    def _place(self, states: dict[str, Any]) -> str:
        return " ".join(self._word(name, states) for name in ("floor", "time") if name in states)

    def _word(self, name: str, states: dict[str, Any]) -> str:
        return self._pick(getattr(self.book, name)[states[name][0]]) if name in states else ""

    def _pick(self, wordings: tuple[str, ...]) -> str:
        return wordings[int(self.chance.random() * len(wordings))]
