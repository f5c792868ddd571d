"""Scores of single samples: kept while testing, written beside a run, and compared between runs.

`scores.json` names every sample once, and has a column of values for each measure, null where it does not apply:

    {"samples": ["000000.tar/00000000", …], "measures": {"R@1 full": [1, 0.5, null, …], …}}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lit_gen.errors import UserError

FILE = "scores.json"
_DIGITS = 5  # of a value in the file: intervals are wider than what that rounds away, and a sweep has many files


class Scores:
    """Values of named measures for samples named by key; what a mean over a test set is made of."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = {}

    def add(self, keys: list[str], **measures: Tensor) -> None:
        """Values [B] of some measures of samples `keys`; what is not a number is left out (a measure that does not
        apply to a sample)."""
        for name, values in measures.items():
            column = self.values.setdefault(name.replace("_", " "), {})
            for key, value in zip(keys, torch.as_tensor(values).detach().float().tolist(), strict=True):
                if value == value:
                    column[key] = value

    def write(self, folder: Path) -> None:
        """Gather the ranks' values and write `scores.json`; every rank must call this."""
        parts = [self.values]
        if dist.is_available() and dist.is_initialized():
            parts = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.values)
            if dist.get_rank():
                return
        together: dict[str, dict[str, float]] = {}
        for part in parts:
            for name, column in part.items():
                together.setdefault(name, {}).update(column)
        if together:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{FILE}.tmp"
            temporary.write_text(json.dumps(_packed(together), separators=(",", ":")))
            temporary.replace(folder / FILE)


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Measure -> key -> value, of a tested run; also from files that name every sample under every measure."""
    try:
        found = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {FILE}; run `test` on it") from None
    if not isinstance(found.get("samples"), list):
        return found
    keys = found["samples"]
    return {
        name: {key: value for key, value in zip(keys, column, strict=True) if value is not None}
        for name, column in found["measures"].items()
    }


def _packed(values: dict[str, dict[str, float]]) -> dict[str, Any]:
    keys = sorted({key for column in values.values() for key in column})
    return {
        "samples": keys,
        "measures": {name: [_short(column.get(key)) for key in keys] for name, column in values.items()},
    }


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return value
    value = float(f"{value:.{_DIGITS}g}")
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def table(runs: list[dict[str, dict[str, float]]], measure: str) -> tuple[np.ndarray, list[str]]:
    """Values S N of a measure, of S seeds' runs over the N samples that all of them scored, and their keys."""
    columns = [run.get(measure, {}) for run in runs]
    keys = sorted(set.intersection(*(set(c) for c in columns))) if columns else []
    if not keys:
        raise UserError(f"no sample has a `{measure}` in all of {len(runs)} runs; test them on the same set")
    return np.array([[column[key] for key in keys] for column in columns]), keys


def bootstrap(values: np.ndarray, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of values S N and its bootstrap interval; seeds (S) and samples (N) are both drawn anew."""
    rng = np.random.default_rng(seed)
    seeds, samples = values.shape
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(seeds, size=seeds)
        columns = rng.integers(samples, size=samples)
        means[i] = values[rows][:, columns].mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def difference(ours: list[dict], theirs: list[dict], measure: str, **options: float) -> Estimate:
    """Mean difference ours - theirs of a measure, paired by seed and sample, with its bootstrap interval."""
    a, ours_keys = table(ours, measure)
    b, theirs_keys = table(theirs, measure)
    keys = sorted(set(ours_keys) & set(theirs_keys))
    if not keys:
        raise UserError(f"the runs share no sample with a `{measure}`, so it cannot be compared in pairs")
    count = min(len(a), len(b))
    places = [[column.index(key) for key in keys] for column in (ours_keys, theirs_keys)]
    return bootstrap(a[:count, places[0]] - b[:count, places[1]], **options)
