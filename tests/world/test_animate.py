"""Every motion class is plain in the rendered video, and the mover stays in the picture."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lit_gen.world.motion import animate
from lit_gen.world.render import render
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.vocabulary import MOTIONS

FRAMES = 8


@pytest.fixture(scope="module")
def films() -> dict[str, torch.Tensor]:
    scenes = sample("motion", "val", 0, torch.arange(160))
    moments = animate(scenes, torch.linspace(0, 1, FRAMES))
    shots = render(moments, supersample=1)
    mask = (shots.instance == 1).float()
    area, grid = mask.sum((1, 2)), torch.arange(64.0)
    across, down = (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area
    per_film = {"area": area, "across": across, "down": down, "rgb": shots.rgb, "mask": mask}
    return {"motion": scenes.motion, **{name: value.unflatten(0, (-1, FRAMES)) for name, value in per_film.items()}}


def test_moves(films: dict[str, torch.Tensor]) -> None:
    step = films["across"].diff(dim=1)
    for name, sign in (("moves left", -1), ("moves right", 1)):
        chosen = step[films["motion"] == MOTIONS.index(name)] * sign
        assert len(chosen) > 8 and (chosen > 1).all() and (chosen.sum(1) > 18).all()
    others = films["motion"] >= MOTIONS.index("jumps")
    assert films["across"][others].diff(dim=1).abs().sum(1).max() < 16


def test_jumps(films: dict[str, torch.Tensor]) -> None:
    chosen = films["down"][films["motion"] == MOTIONS.index("jumps")]
    assert ((chosen[:, 0] - chosen[:, 3]) > 9).all()
    assert torch.allclose(chosen[:, 0], chosen[:, -1], atol=0.01)


def test_grows_and_shrinks(films: dict[str, torch.Tensor]) -> None:
    ratio = films["area"][:, -1] / films["area"][:, 0]
    assert (ratio[films["motion"] == MOTIONS.index("grows")] > 2.2).all()
    assert (ratio[films["motion"] == MOTIONS.index("shrinks")] < 0.45).all()
    rest = (films["motion"] != MOTIONS.index("grows")) & (films["motion"] != MOTIONS.index("shrinks"))
    assert ((ratio[rest] > 0.6) & (ratio[rest] < 1.7)).all()


def test_turning_shows_on_the_mover_and_circling_also_around_it(films: dict[str, torch.Tensor]) -> None:
    change = films["rgb"].diff(dim=1).abs().mean(2)  # films 7 64 64
    inside = films["mask"][:, 1:] * films["mask"][:, :-1]
    outside = (1 - films["mask"][:, 1:]) * (1 - films["mask"][:, :-1])
    on_mover = (change * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    around = (change * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3))
    spins, circled = (films["motion"] == MOTIONS.index(name) for name in ("spins", "is circled"))
    still = films["motion"] == MOTIONS.index("stays still")
    assert on_mover[still].max() == 0 and around[still].max() == 0
    assert on_mover[spins].min() > 0.003 and on_mover[spins].median() > 0.03  # black at night is the hardest
    assert around[spins].max() < 0.01
    assert around[circled].min() > 0.008


def test_the_mover_stays_in_the_picture(films: dict[str, torch.Tensor]) -> None:
    assert films["area"].min() > 40
    mask = films["mask"].bool()
    cut = mask[..., [0, -1], :].flatten(1).any(1) | mask[..., [0, -1]].flatten(1).any(1)
    assert cut.float().mean() < 0.08


def test_animate_is_pure_and_orders_by_scene() -> None:
    scenes = sample("motion", "train", 0, torch.arange(12))
    before = {f.name: getattr(scenes, f.name).clone() for f in fields(Scenes)}
    times = torch.tensor([0.0, 0.3, 1.0])
    moments = animate(scenes, times)
    assert len(moments) == 36 and torch.equal(moments.index, scenes.index.repeat_interleave(3))
    assert all(torch.equal(getattr(scenes, name), value) for name, value in before.items())
    alone = animate(scenes[7:8], times[1:2])
    assert torch.allclose(moments.position[22], alone.position[0])


def test_scenes_without_a_motion_stand_still() -> None:
    scenes = sample("base", "train", 0, torch.arange(20))
    moments = animate(scenes, torch.linspace(0, 1, 3))
    assert torch.equal(moments.position, scenes.position.repeat_interleave(3, 0))
    assert torch.equal(moments.azimuth, scenes.azimuth.repeat_interleave(3))
