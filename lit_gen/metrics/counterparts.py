"""Prompts of the world with their truth: pictures of scenes that a prompt is true of, all else being as it may."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.metrics.palette import coverage_error, palette_error
from lit_gen.world.grammar import Caption, captions
from lit_gen.world.render import render
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import COLOURS, PATTERNS, SHAPES

CHANGES = {"colour": ("colour", len(COLOURS)), "pattern": ("pattern", len(PATTERNS)), "shape": ("kind", len(SHAPES))}
_POOL = 4096  # scenes among which those of one object are looked for


@dataclass
class WorldPrompts:
    """Prompts "a red cylinder" of the world, each with a different object.

    Args:
        count: how many.
        split: "val" has combinations that were trained on, "test" held-out ones.
        seed: which ones.
    """

    count: int = 4
    split: Literal["train", "val", "test"] = "val"
    seed: int = 0

    def draw(self) -> tuple[list[Caption], Scenes]:
        """Captions that state shape and colour, and scenes (count of them) that they describe."""
        scenes = _singles(self.split, self.seed)
        told = captions(scenes, "medium", seed=self.seed)
        plain = [i for i, caption in enumerate(told) if set(caption.facts) == {"objects", "relations"}]
        chosen: dict[tuple[int, int], int] = {}
        for i in plain:
            if "colour" in told[i].facts["objects"][0]:
                chosen.setdefault((int(scenes.kind[i, 0]), int(scenes.colour[i, 0])), i)
        if len(chosen) < self.count:
            raise UserError(f"there are only {len(chosen)} prompts of one object, not {self.count}")
        taken: list[int] = []
        used: Counter[tuple[str, int]] = Counter()
        for _ in range(self.count):  # those that differ most from the ones before
            kind, colour = min(chosen, key=lambda c: (used["kind", c[0]] + used["colour", c[1]], chosen[c]))
            used.update([("kind", kind), ("colour", colour)])
            taken.append(chosen.pop((kind, colour)))
        index = torch.tensor(taken)
        return [told[i] for i in index.tolist()], scenes[index]


@dataclass
class WorldEdits:
    """Edits of the world, "a red cylinder" to "a blue cylinder", with the pictures that they should give.

    Each changes one attribute that the prompts state: colour, pattern or shape, in turn.

    Args:
        count: how many.
        split: "val" has combinations that were trained on, "test" held-out ones.
        seed: which ones.
    """

    count: int = 6
    split: Literal["train", "val", "test"] = "val"
    seed: int = 0

    def draw(self) -> tuple[list[str], list[str], Scenes, Scenes, list[str]]:
        """Prompts before and after, scenes (count of them) before and after, and what changes."""
        scenes = _singles(self.split, self.seed)
        told = captions(scenes, "full", seed=self.seed)
        plain = [scenes.kind[i, 0] < len(SHAPES) and "marked" not in c.facts["objects"][0] for i, c in enumerate(told)]
        rows = [i for i, fits in enumerate(plain) if fits and {"colour", "pattern"} <= set(told[i].facts["objects"][0])]
        if len(rows) < self.count:
            raise UserError(f"there are only {len(rows)} edits, not {self.count}")
        before = scenes[torch.tensor(rows[: self.count])]
        changed = [list(CHANGES)[i % len(CHANGES)] for i in range(self.count)]
        columns = {column: getattr(before, column).clone() for column, _ in CHANGES.values()}
        for i, change in enumerate(changed):
            column, values = CHANGES[change]
            away = 1 + i // len(CHANGES) % (values - 1)  # never all the way round
            columns[column][i, 0] = (columns[column][i, 0] + away) % values
        after = before.replace(**columns)
        texts = ([c.text for c in captions(s, "full", seed=self.seed)] for s in (before, after))
        return *texts, before, after, changed


def pictures_of(scene: Scenes, count: int, seed: int = 1) -> tuple[Tensor, Scenes]:
    """True pictures (count 3 64 64 in [-1, 1]) of the shape and colour of one scene, everything else drawn anew."""
    scenes = _singles("val", seed, scene.kind.device)
    scenes = scenes[torch.arange(count, device=scene.kind.device) % len(scenes)]
    kind, colour = scenes.kind.clone(), scenes.colour.clone()
    kind[:, 0], colour[:, 0] = scene.kind[0, 0], scene.colour[0, 0]
    scenes = scenes.replace(kind=kind, colour=colour)
    return render(scenes).rgb * 2 - 1, scenes


def judge_prompts(pictures: Tensor, scenes: Scenes, truths: int, oracle: str | None) -> dict[str, Tensor]:
    """Measures of pictures of `WorldPrompts`, each of P values, one for each prompt.

    Args:
        pictures: P*N 3 64 64 in [-1, 1], those of a prompt together.
        scenes: P of them, as `WorldPrompts.draw` gives them.
        truths: true pictures of each prompt that colours and variety are compared with.
        oracle: folder of the oracle; without one only colours are compared.
    """
    rows: dict[str, list[Tensor]] = {}
    for i, own in enumerate(pictures.unflatten(0, (len(scenes), -1))):
        truth, true_scenes = pictures_of(scenes[i : i + 1], truths)
        found = palette_error(own, truth)
        if oracle:
            from lit_gen.metrics.oracle import bundled

            reading = bundled(oracle).to(pictures.device).read(own)
            shown = reading.present & (reading.kind == scenes.kind[i, 0])
            found["prompt accuracy"] = (shown & (reading.colour == scenes.colour[i, 0])).any(1).float().mean()
            # of the object that was asked for, where it is there
            pattern = reading.pattern.gather(1, shown.float().argmax(1, keepdim=True))[shown.any(1)]
            found["pattern coverage error"] = coverage_error(pattern, true_scenes.pattern[:, 0], len(PATTERNS))
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def _singles(split: str, seed: int, device: torch.device | str = "cpu") -> Scenes:
    """Scenes of one ordinary object, photographed."""
    scenes = sample("photo", split, seed, torch.arange(_POOL, device=device))
    alone = (scenes.kind[:, 1] < 0) & (scenes.subject[:, 0] < 0) & ~scenes.normals & (scenes.style == 0)
    return scenes[alone]
