"""How well descriptions of every level find their videos, beside how well they could.

A short description fits several videos of a gallery, and nobody can tell which of them was meant: the ceiling of R@1 is
the mean of 1 / (videos that fit). Where captions say what they state that is known exactly.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.metrics.scores import Scores
from lit_gen.retrieval.ranking import Expansion, Ranks, rank

PARAGRAPH = "full"
# What is averaged over levels, each level with the same weight.
GROUPS = {
    "all": lambda level: True,
    "short": lambda level: level.endswith("short"),
    "long": lambda level: level.endswith("long"),
    "partial": lambda level: level.startswith("partial"),
}
WORDING = {"seen": "", "words": " unseen words", "templates": " unseen templates"}


@dataclass
class Query:
    """One description of a video of the gallery."""

    video: int  # id
    key: str  # of the video's sample
    level: str
    text: str
    wording: str = "seen"
    cut: bool = False  # whether the text encoder did not see all of it
    states: dict[str, Any] | None = None
    paraphrases: list[str] = field(default_factory=list)


@dataclass
class Gallery:
    """The videos that are searched."""

    ids: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)  # of `features`, B D each
    truths: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """N D, unit vectors."""
        return torch.cat(self.parts) if self.parts else torch.zeros(0, 0)

    def add(self, ids: Sequence[int], features: Tensor, truths: Sequence[dict[str, Any] | None]) -> None:
        if len(ids):
            self.ids += ids
            self.parts.append(features.float().cpu())
            self.truths += truths

    def gathered(self) -> Gallery:
        """The videos of all ranks, in the order of their ids, so that nothing depends on who had which.

        Raises:
            UserError: there is no video, or two have one id.
        """
        # One tensor that owns all of its memory: of a view, pickle would write all that it is a view of.
        own = (self.ids, self.features, self.truths)
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        ids = [number for rank in ranks for number in rank[0]]
        if not ids:
            raise UserError("there is no video to search among: the set is empty, or none of its samples can be read")
        truths = [truth for rank in ranks for truth in rank[2]]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        for one, other in itertools.pairwise(order):
            if ids[one] == ids[other]:
                raise UserError(f"two videos of the gallery have the id {ids[one]}; give each its own in its json")
        features = torch.cat([rank[1] for rank in ranks if len(rank[0])])
        return Gallery([ids[i] for i in order], [features[order]], [truths[i] for i in order])


def queries_of(story: dict[str, Any], key: str, expanded: bool) -> list[Query]:
    """Every description of a video; one in another wording only where that changes its text."""
    usual = {(c["level"], c["text"]) for c in story["captions"] if c.get("wording", "seen") == "seen"}
    found = []
    for caption in story["captions"]:
        if "wording" in caption and (caption["level"], caption["text"]) in usual:
            continue
        again = caption.get("paraphrases", []) if expanded else []
        wording = caption.get("wording", "seen")
        found.append(
            Query(story["id"], key, caption["level"], caption["text"], wording, False, caption.get("states"), again)
        )
    return found


@dataclass
class Evaluation:
    """Every query's result, on this rank, as columns."""

    queries: list[Query]
    ranks: Ranks
    expanded: Ranks | None
    projected: Ranks | None  # of the queries' features through theta_p
    ceiling: Tensor  # Q, 1 / videos that fit; NaN where it is not known
    fitting: Tensor  # Q, whether the first video fits what is stated; NaN where it is not known


def evaluate(
    gallery: Gallery,
    queries: list[Query],
    features: Tensor,
    expanded: Tensor | None = None,
    projected: Tensor | None = None,
    how: Expansion = "features",
    scale: float = 100.0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Rank the whole gallery for every query.

    Args:
        gallery: of all ranks.
        queries: of this rank, Q.
        features: Q D, unit vectors.
        expanded: Q T D, of each query and what it is expanded by; None for no expansion.
        projected: Q D, of the queries through another head, whose R@1 is to be compared; None for none.
        how, scale, device: see `ranking.rank`.
    """
    rows = {number: row for row, number in enumerate(gallery.ids)}
    lost = next((q for q in queries if q.video not in rows), None)
    if lost is not None:
        raise UserError(f"{lost.key}: there is no video with the id {lost.video} that its captions are of")
    own = torch.tensor([rows[q.video] for q in queries], dtype=torch.long)
    videos = gallery.features
    ranks = rank(features, videos, own, device=device)
    expansion = None if expanded is None else rank(expanded, videos, own, how, scale, device=device)
    other = None if projected is None else rank(projected, videos, own, device=device)
    ceiling, fitting = torch.full((len(queries),), torch.nan), torch.full((len(queries),), torch.nan)
    if all(truth is not None for truth in gallery.truths):
        from lit_gen.world.stories.truth import Gallery as Truths

        truths = Truths(gallery.truths)
        for i, query in enumerate(queries):
            if query.states is not None:
                fits = truths.fits(query.states)
                ceiling[i], fitting[i] = 1 / max(int(fits.sum()), 1), float(fits[ranks.best[i]])
    return Evaluation(queries, ranks, expansion, other, ceiling, fitting)


def summarise(found: Evaluation) -> tuple[dict[str, float], Scores]:
    """Figures per level, macro means over levels, and every video's scores, from the results of all ranks.

    A level's figure is the mean over its videos (of a video's captions at that level first), a group's the mean over
    its levels, so that no level counts more for having more captions. "of ceiling" is R@1 over the mean ceiling.
    """
    columns = _columns(found)
    parts = [columns]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, columns)
    table: dict[
        tuple[str, str], dict[str, dict[str, list[float]]]
    ] = {}  # (wording, level) -> measure -> video -> values
    for part in parts:
        for place, measures in part.items():
            for measure, videos in measures.items():
                for key, values in videos.items():
                    table.setdefault(place, {}).setdefault(measure, {}).setdefault(key, []).extend(values)
    figures: dict[str, float] = {}
    scores = Scores()
    for wording, suffix in WORDING.items():
        levels = {level: measures for (w, level), measures in table.items() if w == wording}
        means = {level: _of_ceiling({m: _means(v) for m, v in measures.items()}) for level, measures in levels.items()}
        for level in sorted(means):
            for measure, values in means[level].items():
                numbers = torch.tensor(list(values.values()))
                figure = numbers.median() if measure == "median rank" else numbers.mean()
                figures[f"{level}{suffix}/{measure}"] = float(figure)
                scores.add(list(values), **{f"{measure} {level}{suffix}": numbers})
        for group, belongs in GROUPS.items():
            members = [level for level in sorted(means) if belongs(level)]
            for measure in {m for level in members for m in means[level]}:
                figures[f"mean of {group}{suffix}/{measure}"] = _mean(
                    figures[f"{level}{suffix}/{measure}"] for level in members if measure in means[level]
                )
                together: dict[str, list[float]] = defaultdict(list)
                for level in members:
                    for key, value in means[level].get(measure, {}).items():
                        together[key].append(value)
                values = _means(together)
                scores.add(list(values), **{f"{measure} mean of {group}{suffix}": torch.tensor(list(values.values()))})
    return figures, scores


def _columns(found: Evaluation) -> dict[tuple[str, str], dict[str, dict[str, list[float]]]]:
    recalls = {k: found.ranks.recall(k) for k in (1, 5, 10)}
    measures = {f"R@{k}": values for k, values in recalls.items()}
    measures["Avg R"] = (recalls[1] + recalls[5] + recalls[10]) / 3
    measures["median rank"] = found.ranks.expected()
    measures["ceiling"], measures["fitting first"] = found.ceiling, found.fitting
    measures["cut off"] = torch.tensor([float(q.cut) for q in found.queries])
    if found.expanded is not None:
        applies = torch.tensor([bool(q.paraphrases) for q in found.queries])
        measures["R@1 expanded"] = found.expanded.recall(1).float().masked_fill(~applies, torch.nan)
    if found.projected is not None:
        measures["R@1 projected"] = found.projected.recall(1)
    table: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for name, values in measures.items():
        for query, value in zip(found.queries, values.tolist(), strict=True):
            if value == value:
                place = table.setdefault((query.wording, query.level), {})
                place.setdefault(name, {}).setdefault(query.key, []).append(value)
    return table


def _of_ceiling(means: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Adds R@1 as a share of what is possible: each video's over the mean ceiling, so that the mean is the ratio."""
    ceiling = means.get("ceiling")
    if not ceiling:
        return means
    possible = _mean(ceiling.values())
    return means | {"R@1 of ceiling": {key: value / possible for key, value in means["R@1"].items()}}


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {key: _mean(many) for key, many in values.items()}


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
