"""Scenes are a pure function of (recipe, split, seed, index), keep to their splits, and can be seen and told apart."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from lit_gen.world.combinations import SUBJECTS, combination_is_held_out, is_held_out, subject_kind
from lit_gen.world.draws import Draws, salt
from lit_gen.world.recipes import RECIPES
from lit_gen.world.render import render
from lit_gen.world.sampling import SPLITS, sample, view_of
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import NAMED, style_is_held_out
from lit_gen.world.vocabulary import COLOURS, FLOORS, KINDS, MOTIONS, PATTERNS, RELATIONS, STYLES, VIEWS

EVERY = sorted(RECIPES)


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scenes))


@pytest.mark.parametrize("recipe", EVERY)
def test_a_scene_depends_on_its_index_alone(recipe: str) -> None:
    index = torch.tensor([5, 70, 3, 41, 5])
    all_at_once = sample(recipe, "train", 1, torch.arange(71))
    assert same(all_at_once[index], sample(recipe, "train", 1, index))
    assert not torch.equal(all_at_once.azimuth, sample(recipe, "train", 2, torch.arange(71)).azimuth)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
@pytest.mark.parametrize("recipe", EVERY)
def test_a_gpu_draws_the_same_scenes(recipe: str) -> None:
    index = torch.arange(4096)
    cpu, gpu = sample(recipe, "train", 1, index), sample(recipe, "train", 1, index.cuda()).to("cpu")
    for f in fields(Scenes):
        a, b = getattr(cpu, f.name), getattr(gpu, f.name)
        assert torch.allclose(a, b, atol=1e-4) if a.is_floating_point() else torch.equal(a, b), f.name


def test_uniforms_are_uniform_and_streams_do_not_know_of_each_other() -> None:
    index = torch.arange(20_000)
    streams = []
    for salted in (
        salt("base", "train", 0),
        salt("base", "train", 1),
        salt("base", "val", 0),
        salt("pairs", "train", 0),
    ):
        draws = Draws(index, salted)
        streams += [draws.uniforms("floor", 1)[:, 0], draws.uniforms("azimuth", 2)[:, 1]]
        streams.append(Draws(index + 1, salted).uniforms("floor", 1)[:, 0])
    u = torch.stack(streams)
    assert (u.mean(1) - 0.5).abs().max() < 0.01
    assert (u.var(1) - 1 / 12).abs().max() < 0.003
    off_diagonal = torch.corrcoef(u) - torch.eye(len(u))
    # A stream and itself one index later are the same numbers shifted, so they too must look unrelated here.
    assert off_diagonal.abs().max() < 0.035


def test_no_recipe_repeats_another_recipes_scenes() -> None:
    azimuths = torch.stack([sample(r, s, 0, torch.arange(500)).fov for r in ("base", "photo", "named") for s in SPLITS])
    correlation = torch.corrcoef(azimuths) - torch.eye(len(azimuths))
    assert correlation.abs().max() < 0.2


@pytest.mark.parametrize("recipe", EVERY)
def test_train_and_val_are_seen_and_test_is_not(recipe: str) -> None:
    index = torch.arange(1500)
    for split in ("train", "val"):
        scenes = sample(recipe, split, 0, index)
        assert not is_held_out(scenes).any()
        assert not style_is_held_out(scenes.style_parameters)[scenes.style < 0].any()
    scenes = sample(recipe, "test", 0, index)
    assert is_held_out(scenes)[:, 0].all()
    assert not is_held_out(scenes)[:, 1:].any()
    assert style_is_held_out(scenes.style_parameters)[scenes.style < 0].all()


def test_an_eighth_of_all_combinations_is_held_out_in_every_colour_and_kind() -> None:
    colour, kind, pattern = (torch.arange(len(words)) for words in (COLOURS, KINDS, PATTERNS))
    held_out = combination_is_held_out(colour[:, None, None], kind[:, None], pattern)
    assert held_out.float().mean() == 0.125
    assert held_out.any(2).any(1).all() and held_out.any(2).any(0).all()
    assert not held_out.all(2).any()


def test_objects_of_a_scene_have_different_colours() -> None:
    colour = sample("base", "train", 0, torch.arange(3000)).colour
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = (colour[:, a] >= 0) & (colour[:, b] >= 0)
        assert both.any() and not (colour[both, a] == colour[both, b]).any()


def test_base_holds_enough_of_everything() -> None:
    scenes = sample("base", "train", 0, torch.arange(8000))
    count = (scenes.kind >= 0).sum(1)
    assert ((count == 2) & (scenes.relation[:, 0] >= 0)).float().mean() > 0.25
    on_backdrop = scenes.floor == FLOORS.index("backdrop")
    assert (scenes.marked[:, 0] & (scenes.view >= 0) & on_backdrop & (count == 1)).float().mean() > 0.14
    assert (scenes.kind >= KINDS.index("snowman")).any(1).float().mean() > 0.1
    assert abs((scenes.style == 0).float().mean() - 0.6) < 0.03
    assert abs((scenes.style > 0).float().mean() - 0.2) < 0.03
    assert abs(scenes.normals.float().mean() - 0.04) < 0.01
    assert abs((scenes.subject >= 0).any(1).float().mean() - 0.06) < 0.015
    for words, column in ((RELATIONS, scenes.relation[:, 0]), (FLOORS, scenes.floor), (STYLES, scenes.style)):
        shares = torch.bincount(column[column >= 0], minlength=len(words)).float() / len(scenes)
        assert shares.min() > 0.015, dict(zip(words, shares.tolist(), strict=True))
    for words, column in ((KINDS, scenes.kind), (COLOURS, scenes.colour), (PATTERNS, scenes.pattern)):
        assert torch.bincount(column[column >= 0], minlength=len(words)).min() > 200
    assert torch.bincount(scenes.view[scenes.view >= 0], minlength=len(VIEWS)).min() > 250
    assert torch.bincount(scenes.time, minlength=3).min() > 250


def test_times_share_a_layout_and_subjects_share_a_subject() -> None:
    scenes = sample("times", "train", 0, torch.arange(300))
    assert torch.equal(scenes.time, torch.arange(300) % 3)
    for name in ("kind", "colour", "position", "azimuth", "target", "floor"):
        value = getattr(scenes, name).unflatten(0, (-1, 3))
        assert (value == value[:, :1]).all(), name
    assert not (scenes.floor == FLOORS.index("backdrop")).any()

    scenes = sample("subjects", "train", 0, torch.arange(400))
    subject = scenes.subject[:, 0].unflatten(0, (-1, 8))
    assert (subject == subject[:, :1]).all() and len(subject[:, 0].unique()) == 50
    assert (subject < SUBJECTS).all() and (
        sample("subjects", "test", 0, torch.arange(9)).subject[:, 0] >= SUBJECTS
    ).all()
    assert torch.equal(scenes.kind[:, 0], subject_kind(scenes.subject[:, 0]))
    assert len(scenes.azimuth.unique()) > 390


def test_view_words_are_plain() -> None:
    scenes = sample("views", "train", 0, torch.arange(2000))
    assert (scenes.view >= 0).all() and scenes.marked[:, 0].all() and (scenes.yaw == 0).all()
    assert torch.equal(scenes.view, view_of(scenes.azimuth, scenes.elevation))
    assert torch.bincount(scenes.view).min() > 400


def test_facing_relations_are_said_of_near_front_cameras_only() -> None:
    scenes = sample("base", "train", 0, torch.arange(5000))
    facing = ((scenes.relation >= 0) & (scenes.relation < RELATIONS.index("on top of"))).any(1)
    degrees = 180 / math.pi
    assert facing.any() and (scenes.azimuth[facing].abs() * degrees <= 20.01).all()
    assert (scenes.elevation[facing] * degrees).min() > 9.9 and (scenes.elevation[facing] * degrees).max() < 35.1
    assert (scenes.elevation * degrees).min() > -10.1 and (scenes.elevation * degrees).max() < 80.1
    eye_height = scenes.target[:, 2] + scenes.distance * scenes.elevation.sin()
    assert eye_height.min() > 0.09


@pytest.mark.parametrize("recipe", ["base", "pairs", "views"])
def test_objects_are_in_the_picture_and_stand_as_said(recipe: str) -> None:
    scenes = sample(recipe, "val", 3, torch.arange(250))
    photo = torch.zeros_like(scenes.style)
    scenes = scenes.replace(style=photo, style_parameters=NAMED[photo])
    present = scenes.kind >= 0
    seen = render(scenes, supersample=1).instance
    area, centre, cut = torch.zeros(3, 250), torch.zeros(3, 250, 2), torch.zeros(3, 250, dtype=torch.bool)
    grid = torch.arange(64.0)
    for k in range(3):
        area[k] = (seen == k + 1).flatten(1).sum(1)
        rows = present[:, k].nonzero()[:, 0]
        if len(rows):
            alone = scenes.kind.where(torch.arange(3) == k, -1)
            whole = render(scenes.replace(kind=alone)[rows], supersample=1).instance > 0
            weight = whole.float()
            centre[k, rows, 0] = (weight.sum(1) * grid).sum(1) / weight.sum((1, 2))
            centre[k, rows, 1] = (weight.sum(2) * grid).sum(1) / weight.sum((1, 2))
            cut[k, rows] = whole[:, [0, -1]].flatten(1).any(1) | whole[:, :, [0, -1]].flatten(1).any(1)
    assert (area.T[present] >= 40).float().mean() > 0.99
    assert cut.T[present].float().mean() < 0.02
    tests = {
        "left of": lambda x, y: (x < -8) & (y.abs() < x.abs()),
        "right of": lambda x, y: (x > 8) & (y.abs() < x.abs()),
        "behind": lambda x, y: y < -2,
        "in front of": lambda x, y: y > 2,
        "on top of": lambda x, y: (y < -8) & (x.abs() < 6),
        "next to": lambda x, y: x.abs() > 8,
    }
    for k in (0, 2):
        for word, test in tests.items():
            said = scenes.relation[:, k] == RELATIONS.index(word)
            across, down = (centre[k] - centre[1])[said].unbind(1)
            assert test(across, down).float().mean() > 0.98 if said.any() else True, word


def test_turning_movers_look_different_from_different_sides() -> None:
    scenes = sample("motion", "train", 0, torch.arange(2000))
    assert torch.bincount(scenes.motion, minlength=len(MOTIONS)).min() > 180
    turning = (scenes.motion == MOTIONS.index("spins")) | (scenes.motion == MOTIONS.index("is circled"))
    uneven = (scenes.kind[:, 0] == KINDS.index("cube")) | (scenes.pattern[:, 0] >= 2) | scenes.marked[:, 0]
    assert uneven[turning].all()


def test_what_moves_sideways_goes_left_as_often_as_right() -> None:
    scenes = sample("sideways-motion", "train", 0, torch.arange(2000))
    found = {MOTIONS[i]: int(n) for i, n in enumerate(scenes.motion.bincount(minlength=len(MOTIONS))) if n}
    assert found.keys() == {"moves left", "moves right"} and min(found.values()) > 900


def test_unknown_names_are_explained() -> None:
    with pytest.raises(KeyError, match="there are base"):
        sample("bsae", "train", 0, torch.arange(1))
    with pytest.raises(ValueError, match="train, val, test"):
        sample("base", "dev", 0, torch.arange(1))
