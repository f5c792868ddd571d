"""Streamed ranks against a plain sort, ties, expansion, and figures per level."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.retrieval.evaluation import Gallery, Query, evaluate, summarise
from lit_gen.retrieval.ranking import rank, top


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_ranks_are_those_of_a_sort_whatever_the_block(block: int) -> None:
    queries, videos = units(20, 8), units(50, 8, seed=1)
    own = torch.arange(20) * 2
    found = rank(queries, videos, own, block=block)
    order = (queries @ videos.T).argsort(1, descending=True)
    places = (order == own[:, None]).nonzero()[:, 1]
    assert found.before.tolist() == places.tolist() and found.tied.tolist() == [1] * 20
    assert found.best.tolist() == order[:, 0].tolist()
    assert found.expected().tolist() == (places + 1).tolist()
    assert torch.equal(found.recall(5), (places < 5).float())
    values, rows = top(queries, videos, 4, block=block)
    assert rows.tolist() == order[:, :4].tolist()
    torch.testing.assert_close(values, (queries @ videos.T).gather(1, order[:, :4]))


def test_ties_count_as_chance_would_have_them() -> None:
    """Every order of four videos with one score is as likely."""
    videos = units(1, 8).expand(4, -1).clone()
    videos = torch.cat([videos, units(6, 8, seed=1)])
    query = videos[:1]
    found = rank(query, videos, torch.tensor([2]))
    assert found.before.item() == 0 and found.tied.item() == 4
    places = [order.index(2) + 1 for order in itertools.permutations(range(4))]
    assert found.expected().item() == sum(places) / len(places) == 2.5
    for k in (1, 3, 5):
        assert found.recall(k).item() == sum(place <= k for place in places) / len(places)


@pytest.mark.parametrize("block", [4, 1000])
def test_expanded_queries_average_features_or_probabilities(block: int) -> None:
    texts, videos, own = units(9, 3, 8), units(30, 8, seed=1), torch.arange(9)
    by_features = rank(texts, videos, own, "features", block=block)
    plain = rank(F.normalize(texts.mean(1), dim=-1), videos, own)
    assert torch.equal(by_features.before, plain.before)
    by_scores = rank(texts, videos, own, "scores", scale=20.0, block=block)
    probability = (20 * texts @ videos.T).softmax(-1).mean(1)
    assert by_scores.before.tolist() == (probability > probability[own, own][:, None]).sum(1).tolist()
    assert not torch.equal(by_scores.before, by_features.before)


def stories() -> tuple[Gallery, list[Query], Tensor]:
    """Four videos; a short text fits two of them, and every text is nearest to the first of those."""
    kinds = ["ball", "ball", "cube", "ring"]
    truths = [
        {
            "floor": "grass",
            "time": "day",
            "events": [{"kind": kind, "colour": "red", "pattern": "plain", "motion": "jumps", "other": None}],
        }
        for kind in kinds
    ]
    gallery = Gallery([10, 11, 12, 13], [torch.eye(4)], truths)
    queries, features = [], []
    for row, kind in enumerate(kinds):
        stated = {"events": [{"kind": [kind]}], "order": "some"}
        queries.append(Query(10 + row, f"video {row}", "full-short", f"{kind} jumps", states=stated))
        features.append(torch.eye(4)[kinds.index(kind)])
        queries.append(Query(10 + row, f"video {row}", "full", "paragraph"))
        features.append(torch.eye(4)[row])
    return gallery, queries, torch.stack(features)


def test_the_ceiling_is_what_a_perfect_reader_reaches() -> None:
    figures, scores = summarise(evaluate(*stories()))
    assert figures["full/R@1"] == 1 and figures["full-short/R@1"] == 0.75
    assert figures["full-short/ceiling"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert figures["full-short/R@1 of ceiling"] == pytest.approx(1.0)
    assert figures["full-short/fitting first"] == 1
    assert figures["mean of all/R@1"] == pytest.approx(0.875)  # of the two levels, each once
    assert figures["mean of short/R@1"] == 0.75
    assert scores.values["R@1 full-short"] == {"video 0": 1, "video 1": 0, "video 2": 1, "video 3": 1}
    assert scores.values["R@1 mean of all"]["video 1"] == 0.5
    mean = sum(scores.values["R@1 of ceiling full-short"].values()) / 4
    assert mean == pytest.approx(figures["full-short/R@1 of ceiling"])


def test_more_captions_of_a_level_do_not_make_it_count_more() -> None:
    gallery, queries, features = stories()
    before, _ = summarise(evaluate(gallery, queries, features))
    again = [i for i, q in enumerate(queries) if q.level == "full-short"] * 5
    after, _ = summarise(
        evaluate(gallery, queries + [queries[i] for i in again], torch.cat([features, features[again]]))
    )
    assert after["mean of all/R@1"] == pytest.approx(before["mean of all/R@1"])


def test_captions_without_their_video_and_doubled_ids_are_refused() -> None:
    gallery, queries, features = stories()
    queries[3].video = 99
    with pytest.raises(UserError, match="video 1: there is no video with the id 99"):
        evaluate(gallery, queries, features)
    gallery.ids[2] = 10
    with pytest.raises(UserError, match="two videos of the gallery have the id 10"):
        gallery.gathered()
    with pytest.raises(UserError, match="there is no video to search among"):
        Gallery().gathered()
