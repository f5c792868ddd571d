"""Ground truth as JSON: every attribute of a scene as plain numbers, and back, exactly."""

from __future__ import annotations

from dataclasses import fields

import torch

from lit_gen.world.scene import Scenes


def facts_from_scenes(scenes: Scenes) -> list[dict]:
    """One dict of numbers and lists per scene, named like the fields of Scenes."""
    columns = {f.name: _plain(getattr(scenes, f.name).cpu().tolist()) for f in fields(Scenes)}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(scenes))]


def scenes_from_facts(facts: list[dict]) -> Scenes:
    """The scenes that a batch of facts describes; floats are float32, whole numbers int64, flags bool."""
    columns = {f.name: torch.tensor([fact[f.name] for fact in facts]) for f in fields(Scenes)}
    return Scenes(**columns)


def _plain(value):
    """Shorten floats to the nine digits that identify a float32."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
