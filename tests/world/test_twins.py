"""Scenes that differ in one fact."""

import torch

from lit_gen.world.grammar import captions
from lit_gen.world.sampling import sample
from lit_gen.world.twins import twins
from lit_gen.world.vocabulary import RELATIONS


def test_one_fact_differs_and_its_words_with_it() -> None:
    for recipe in ("pairs", "motion", "photo"):
        scenes = sample(recipe, "train", 0, torch.arange(300))
        other = twins(scenes)
        changed = torch.stack(
            [
                (scenes.relation != other.relation).any(1),
                scenes.motion != other.motion,
                (scenes.colour != other.colour).any(1) | (scenes.pattern != other.pattern).any(1),
            ]
        ).sum(0)
        assert changed.max() == 1 and changed.float().mean() > 0.9
        texts = zip(captions(scenes, seed=1), captions(other, seed=1), strict=True)
        assert sum(a.text != b.text for a, b in texts) > 0.85 * len(scenes)


def test_relations_turn_into_their_opposites() -> None:
    scenes = sample("pairs", "train", 0, torch.arange(500))
    other = twins(scenes)
    turned = (scenes.relation != other.relation) & (scenes.relation == RELATIONS.index("left of"))
    assert turned.sum() > 20
    assert (other.relation[turned] == RELATIONS.index("right of")).all()
