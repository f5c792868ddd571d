"""Scripts of long videos: what happens, as scenes to render and as plain facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gen.world.draws import Draws, salt
from lit_gen.world.motion import animate
from lit_gen.world.recipes import EVENT_CLIPS
from lit_gen.world.render import render
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import ABSENT, COLOURS, FLOORS, KINDS, MOTIONS, PATTERNS, TIMES

FEWEST, MOST = 4, 6  # events of a script


@dataclass
class Script:
    """A long video: its events in order, all in one place, each with a motion of its own.

    truth: "floor" and "time", and "events", each with "kind", "colour", "pattern" and "motion" of what moves and
    "other", the kind of what stands behind it (None where nothing does).
    """

    index: int
    scenes: Scenes  # B = events
    truth: dict[str, Any]


def sample_script(split: str, seed: int, index: int) -> Script:
    """Script number `index`, a pure function of (split, seed, index)."""
    draws = Draws(torch.tensor([index]), salt("script", split, seed))
    count = FEWEST + int(draws.integer("events", MOST - FEWEST + 1))
    scenes = sample("events", split, seed, index * EVENT_CLIPS + torch.arange(count))
    return Script(index, scenes, truth_of(scenes))


def truth_of(scenes: Scenes) -> dict[str, Any]:
    """What happens in the clips of one place."""
    moves, behind = scenes.mover.clamp(min=0).tolist(), scenes.kind[:, 1].tolist()
    events = []
    for i, slot in enumerate(moves):
        kind, colour, pattern = (int(part[i, slot]) for part in (scenes.kind, scenes.colour, scenes.pattern))
        events.append(
            {
                "kind": KINDS[kind],
                "colour": COLOURS[colour],
                "pattern": PATTERNS[pattern],
                "motion": MOTIONS[int(scenes.motion[i])],
                "other": None if behind[i] == ABSENT else KINDS[behind[i]],
            }
        )
    return {"floor": FLOORS[int(scenes.floor[0])], "time": TIMES[int(scenes.time[0])], "events": events}


def film(scripts: list[Script], frames: int, size: int, device: str = "cpu") -> list[Tensor]:
    """The videos of scripts, F 3 size size each in 0..1, F = events * frames."""
    scenes = Scenes.cat([script.scenes for script in scripts]).to(device)
    pictures = render(animate(scenes, torch.linspace(0, 1, frames, device=device)), size).rgb
    return list(pictures.split([frames * len(script.scenes) for script in scripts]))
