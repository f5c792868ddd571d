"""Event scripts keep to one place, and stories tell what happens there."""

from __future__ import annotations

import re

import pytest
import torch

from lit_gen.world.combinations import is_held_out
from lit_gen.world.events import sample_events, tell
from lit_gen.world.grammar import LEVELS, vocabulary_words
from lit_gen.world.vocabulary import FLOORS, KINDS, MOTIONS


def test_clips_share_a_place_and_differ_in_what_happens() -> None:
    for index in range(20):
        scenes = sample_events("train", 0, index).scenes
        assert len(scenes) == 6
        for name in ("floor", "time", "azimuth", "elevation", "fov"):
            assert len(getattr(scenes, name).unique()) == 1, name
        assert len(scenes.motion.unique()) == 6
        assert len((scenes.kind[:, 0] * 8 + scenes.colour[:, 0]).unique()) > 2


def test_scripts_are_a_function_of_their_index_and_split() -> None:
    assert sample_events("train", 0, 3).captions == sample_events("train", 0, 3).captions
    assert sample_events("train", 0, 3).captions != sample_events("train", 0, 4).captions
    assert sample_events("train", 0, 3, clips=4).captions == sample_events("train", 0, 3).captions[:4]
    assert is_held_out(sample_events("test", 0, 3).scenes)[:, 0].all()
    with pytest.raises(ValueError, match="1 to 8"):
        sample_events("train", 0, 0, clips=9)


@pytest.mark.parametrize("level", LEVELS)
def test_stories_state_what_is_true_in_known_words(level: str) -> None:
    known = set(vocabulary_words())
    for index in range(15):
        events = sample_events("train", 0, index)
        story = tell(events, level, seed=index)
        assert set(re.findall(r"[a-z]+", story.text)) <= known
        for clip, facts in story.facts.get("events", []):
            assert facts["motion"] == MOTIONS[events.scenes.motion[clip]]
            assert facts["objects"][0]["kind"] == KINDS[events.scenes.kind[clip, 0]]
        assert story.facts.get("floor") in (None, FLOORS[events.scenes.floor[0]])


def test_levels_of_a_story() -> None:
    events = sample_events("train", 0, 1)
    clips = {level: [clip for clip, _ in tell(events, level).facts.get("events", [])] for level in LEVELS}
    assert clips["full"] == clips["long"] == clips["elementary"] == list(range(6))
    assert len(clips["medium"]) == 2 and clips["short"] == []
    assert 1 <= len(clips["partial"]) <= 3 and clips["partial"] == list(
        range(clips["partial"][0], clips["partial"][0] + len(clips["partial"]))
    )
    assert len(tell(events, "long").text) < len(tell(events, "full").text)
    assert tell(events, "short").facts["cast"]
    assert torch.equal(events.scenes.index, sample_events("train", 0, 1).scenes.index)
