"""Ground truth as JSON: every attribute of a scene as plain numbers, and back, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch

from lit_gen.world.scene import Scenes


class Facts:
    """The facts of B samples: a list of dicts in use, but not a `Sequence`.

    Trainers walk through every sequence of a batch in search of tensors; for some hundred numbers a sample that
    took longer than decoding the pictures.
    """

    def __init__(self, facts: Iterable[dict[str, Any]]) -> None:
        self._facts = list(facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._facts)

    def __getitem__(self, item: int | slice) -> dict[str, Any] | Facts:
        return Facts(self._facts[item]) if isinstance(item, slice) else self._facts[item]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Facts, list)) else NotImplemented

    def __repr__(self) -> str:
        return f"Facts({self._facts!r})"


def facts_from_scenes(scenes: Scenes) -> list[dict]:
    """One dict of numbers and lists per scene, named like the fields of Scenes."""
    columns = {f.name: _plain(getattr(scenes, f.name).cpu().tolist()) for f in fields(Scenes)}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(scenes))]


def scenes_from_facts(facts: Iterable[dict]) -> Scenes:
    """The scenes that a batch of facts describes; floats are float32, whole numbers int64, flags bool."""
    facts = list(facts)
    columns = {f.name: torch.tensor([fact[f.name] for fact in facts]) for f in fields(Scenes)}
    return Scenes(**columns)


def _plain(value: Any) -> Any:
    """Shorten floats to the nine digits that identify a float32."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
