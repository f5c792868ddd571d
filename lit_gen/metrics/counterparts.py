"""Prompts of the world with their truth: pictures of scenes that a prompt is true of, all else being as it may."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.metrics.palette import coverage_error, palette_error, sliced_distance
from lit_gen.metrics.reading import Reading
from lit_gen.world.grammar import Caption, captions
from lit_gen.world.render import render
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import COLOURS, FLOORS, PATTERNS, SHAPES, SIZES, TIMES

CHANGES = {"colour": ("colour", len(COLOURS)), "pattern": ("pattern", len(PATTERNS)), "shape": ("kind", len(SHAPES))}
_POOL = 4096  # scenes among which those of one object are looked for
_SPOKEN_POOL = 12288  # and those that a prompt would be said of
_BINS = 4  # of what is read as a number, with equally many true pictures in each


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
    """True pictures (count 3 64 64 in [-1, 1]) of the shape and colour of one scene, everything else drawn anew from
    scenes that a base's captions would tell by shape and colour alone: hardly by night, or striped."""
    scenes = _spoken("val", seed)
    scenes = scenes[torch.arange(count) % len(scenes)].to(scene.kind.device)
    kind, colour = scenes.kind.clone(), scenes.colour.clone()
    kind[:, 0], colour[:, 0] = scene.kind[0, 0], scene.colour[0, 0]
    scenes = scenes.replace(kind=kind, colour=colour)
    return render(scenes).rgb * 2 - 1, scenes


def judge_prompts(pictures: Tensor, scenes: Scenes, truths: int, oracle: str | None) -> dict[str, Tensor]:
    """Measures of pictures of `WorldPrompts`, each of P values, one for each prompt.

    The "... coverage error" of an attribute that prompts leave open is the total variation distance between what the
    oracle reads off the pictures and what it reads off true ones, in both among those where it sees the object that
    was asked for; "coverage error" is their mean. "sliced Wasserstein" compares whole pictures.

    Args:
        pictures: P*N 3 64 64 in [-1, 1], those of a prompt together.
        scenes: P of them, as `WorldPrompts.draw` gives them.
        truths: true pictures of each prompt that colours and variety are compared with.
        oracle: folder of the oracle; without one only pixels are compared.
    """
    rows: dict[str, list[Tensor]] = {}
    for i, own in enumerate(pictures.unflatten(0, (len(scenes), -1))):
        wanted = int(scenes.kind[i, 0]), int(scenes.colour[i, 0])
        truth, true_reading = _truth(*wanted, truths, oracle, str(pictures.device))
        found = palette_error(own, truth) | {"sliced Wasserstein": sliced_distance(own, truth)}
        if oracle:
            from lit_gen.metrics.oracle import bundled

            reading = bundled(oracle).to(pictures.device).read(own)
            asked = reading.present & (reading.kind == wanted[0]) & (reading.colour == wanted[1])
            found["prompt accuracy"] = asked.any(1).float().mean()
            found |= _coverage(reading, true_reading, wanted[0])
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def _coverage(reading: Reading, truth: Reading, kind: int) -> dict[str, Tensor]:
    """Total variation distances of attributes between readings of a prompt's pictures and of true ones."""
    sides = []
    for side in (reading, truth):
        shown = side.present & (side.kind == kind)
        slot, seen = shown.float().argmax(1, keepdim=True), shown.any(1)
        box = side.box.gather(1, slot[..., None].expand(-1, -1, 4))[:, 0]
        values = {n: getattr(side, n).gather(1, slot)[:, 0] for n in ("pattern", "size")}
        values |= {"floor": side.floor, "time": side.time, "elevation": side.elevation}
        values |= {"across": box[:, 0], "height": box[:, 3]}
        sides.append({name: value[seen] for name, value in values.items()})
    classes = {"pattern": len(PATTERNS), "size": len(SIZES), "floor": len(FLOORS), "time": len(TIMES)}
    errors = {}
    for name, (own, true) in {name: (sides[0][name], sides[1][name]) for name in sides[0]}.items():
        if name not in classes and len(true):  # an oracle may find the object in none
            edges = true.quantile(torch.linspace(0, 1, _BINS + 1, device=true.device)[1:-1])
            own, true = (torch.bucketize(values.contiguous(), edges) for values in (own, true))
        errors[f"{name} coverage error"] = coverage_error(own, true, classes.get(name, _BINS))
    return errors | {"coverage error": torch.stack([*errors.values()]).mean()}


# validation and test of a run need the same ones, a sweep's runs too
@lru_cache(maxsize=32)
def _truth(kind: int, colour: int, count: int, oracle: str | None, device: str) -> tuple[Tensor, Reading | None]:
    """True pictures (count 3 64 64 in [-1, 1]) of a shape and colour, and what the oracle reads off them."""
    scene = _spoken("val", 1)[:1].to(device)
    scene = scene.replace(kind=torch.full_like(scene.kind, kind), colour=torch.full_like(scene.colour, colour))
    pictures = pictures_of(scene, count)[0]
    if oracle is None:
        return pictures, None
    from lit_gen.metrics.oracle import bundled

    return pictures, bundled(oracle).to(device).read(pictures)


@lru_cache(maxsize=8)
def _singles(split: str, seed: int, pool: int = _POOL) -> Scenes:
    """Scenes of one ordinary object, photographed."""
    scenes = sample("photo", split, seed, torch.arange(pool))
    alone = (scenes.kind[:, 1] < 0) & (scenes.subject[:, 0] < 0) & ~scenes.normals & (scenes.style == 0)
    return scenes[alone]


@lru_cache(maxsize=8)
def _spoken(split: str, seed: int) -> Scenes:
    """Those of which captions as bases are trained on say nothing but shape and colour."""
    scenes = _singles(split, seed, _SPOKEN_POOL)
    told = [caption.facts for caption in captions(scenes, "mixed", seed=seed)]
    silent = []
    for facts in told:
        said = facts["objects"][0]
        plain = said.get("pattern", "plain") == "plain"  # a fact without a word
        silent.append(
            plain and set(facts) == {"objects", "relations"} and set(said) - {"pattern"} == {"kind", "colour"}
        )
    return scenes[torch.tensor(silent)]
