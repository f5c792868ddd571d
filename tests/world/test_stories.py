"""Scripts of long videos, everything that is said of them, and the videos that fit what was said."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from lit_gen.world.stories.script import FEWEST, MOST, Script, film, sample_script
from lit_gen.world.stories.tell import LEVELS, WORDINGS, axis_of, paraphrases, tell
from lit_gen.world.stories.truth import Gallery, fits
from lit_gen.world.stories.words import HYPERNYMS, REGISTERS, UNSEEN
from lit_gen.world.vocabulary import COLOURS, MOTIONS


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    return [sample_script("train", 0, i) for i in range(60)]


def test_scripts_have_four_to_six_events_of_one_place(scripts: list[Script]) -> None:
    lengths = {len(script.truth["events"]) for script in scripts}
    assert lengths == set(range(FEWEST, MOST + 1))
    for script in scripts:
        motions = [event["motion"] for event in script.truth["events"]]
        assert len(set(motions)) == len(motions)
        assert len(set(script.scenes.floor.tolist())) == 1
    again, other = sample_script("train", 0, 7), sample_script("train", 1, 7)
    assert again.truth == scripts[7].truth != other.truth


def test_films_show_each_event_for_the_same_time(scripts: list[Script]) -> None:
    videos = film(scripts[:2], frames=2, size=16)
    assert [len(video) for video in videos] == [2 * len(script.scenes) for script in scripts[:2]]
    assert all(video.shape[1:] == (3, 16, 16) for video in videos)
    moving = next(i for i, e in enumerate(scripts[0].truth["events"]) if e["motion"].startswith("moves"))
    first, last = videos[0][2 * moving : 2 * moving + 2]
    assert (first - last).abs().mean() > 0.01


def test_every_description_fits_its_video_and_both_ways_of_asking_agree(scripts: list[Script]) -> None:
    gallery = Gallery([script.truth for script in scripts])
    sizes = {}
    for level in LEVELS:
        sets = []
        for number, script in enumerate(scripts):
            telling = tell(script, level)
            fitting = gallery.fits(telling.states)
            assert fitting[number], (level, telling.text)
            assert fitting.tolist() == [fits(telling.states, other.truth) for other in scripts]
            sets.append(int(fitting.sum()))
        sizes[level] = sum(sets) / len(sets)
    assert sizes["full"] == 1 and sizes["full-short"] > 1.2 and sizes["partial-short"] > sizes["partial"] >= 1


def test_a_video_that_differs_in_one_stated_fact_does_not_fit(scripts: list[Script]) -> None:
    for script in scripts[:20]:
        states = tell(script, "full").states
        for number, event in enumerate(states["events"]):
            for name in event:
                changed = copy.deepcopy(script.truth)
                changed["events"][number][name] = "something else"
                assert not fits(states, changed)
        shorter = script.truth | {"events": script.truth["events"][:-1]}
        assert not fits(states, shorter)
        backwards = script.truth | {"events": script.truth["events"][::-1]}
        assert not fits(states, backwards) and not fits(tell(script, "full-medium").states, backwards)
        assert fits(tell(script, "partial-short").states, backwards)


def test_a_text_says_what_it_states_and_nothing_else(scripts: list[Script]) -> None:
    """Colours and motions are told apart by their words, so texts can be read back."""
    for script in scripts:
        for level in ("full", "full-long", "full-medium", "partial", "partial-short"):
            telling = tell(script, level)
            text = telling.text.lower()
            stated = [value for event in telling.states["events"] for value in event.get("colour", [])]
            assert re.findall(rf"\b({'|'.join(COLOURS)})\b", text) == stated
            motions = []
            for name in MOTIONS:
                for phrase in REGISTERS["standard"].motion[name]:
                    found = text.find(phrase.replace("{} ", "").lower())
                    if found >= 0:
                        motions.append((found, name))
                        break
            assert [name for _, name in sorted(motions)] == [e["motion"][0] for e in telling.states["events"]]


def test_levels_are_as_long_as_the_card_says(scripts: list[Script]) -> None:
    words = {level: sum(len(tell(s, level).text.split()) for s in scripts) / len(scripts) for level in LEVELS}
    assert 4 <= words["full-short"] <= 9 and words["partial-short"] < 6
    assert 8 <= words["full-medium"] <= 14 and words["full-medium"] < words["full-long"] < words["full"]
    assert {axis_of(level) for level in LEVELS} == {"duration", "summarization", "simplification"}


def test_elementary_words_can_stand_for_several_kinds(scripts: list[Script]) -> None:
    wide = [
        (tell(script, "full-elementary"), event)
        for script in scripts
        for event in tell(script, "full-elementary").states["events"]
        if len(event["kind"]) > 1
    ]
    assert wide
    for telling, event in wide:
        assert any(word in telling.text and list(kinds) == event["kind"] for word, kinds in HYPERNYMS.items())


def test_unseen_words_and_frames_are_never_said_in_training(scripts: list[Script]) -> None:
    seen = {
        word
        for script in scripts
        for level in LEVELS
        for seed in range(2)
        for word in re.findall(r"[a-z]+", tell(script, level, seed).text.lower())
    }
    new = {phrase for column in (UNSEEN.kind, UNSEEN.colour) for phrases in column.values() for phrase in phrases}
    assert not new & seen
    for wording in WORDINGS[1:]:
        told = [tell(script, "full", 0, wording) for script in scripts]
        assert all(set(re.findall(r"[a-z]+", one.text.lower())) - seen for one in told)
        plain = [tell(script, "full") for script in scripts]
        assert [one.states for one in told] == [one.states for one in plain]  # only the words differ


def test_paraphrases_are_other_texts_of_the_same_facts(scripts: list[Script]) -> None:
    for level in LEVELS:
        telling = tell(scripts[3], level)
        others = paraphrases(telling, 2)
        assert len({telling.text, *others}) == 3, level
    with pytest.raises(ValueError, match="no level 'tiny'"):
        tell(scripts[0], "tiny")
    assert torch.is_tensor(scripts[0].scenes.kind)
