"""Scenes rendered on the training device."""

from pathlib import Path

import torch

from lit_gen.data.captions import write_captions
from lit_gen.data.world import Draws, RenderedWorld, _at_some_time
from lit_gen.world.sampling import sample


def test_draws_are_permutations_and_resume_anywhere() -> None:
    straight = Draws(10, 3, seed=5)
    epochs = [torch.cat(list(straight)) for _ in range(3)]
    assert all(len(set(e.tolist())) == 9 for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for stop in range(1, 6):
        first = Draws(10, 3, seed=5)
        seen = []
        while len(seen) < stop:
            for batch in first:
                seen.append(batch)
                if len(seen) == stop:
                    break
        second = Draws(10, 3, seed=5)
        second.load_state_dict(first.state_dict())
        while len(seen) < 9:
            seen.extend(second)
        assert torch.equal(torch.cat(seen[:9]), torch.cat(epochs))


def test_validation_draws_everything_in_order() -> None:
    draws = Draws(10, 4, seed=0, shuffle=False)
    assert [len(b) for b in draws] == [4, 4, 2]
    assert torch.equal(torch.cat(list(draws)), torch.arange(10))


def test_ranks_render_disjoint_shares_of_one_pool() -> None:
    module = RenderedWorld(recipes={"base": 0.5, "motion": 0.5}, captions=1, masks=True, workers=1, seed=3)
    device = torch.device("cpu")
    whole = module._fill("train", 8, 0, 1, device)
    halves = [module._fill("train", 8, rank, 2, device) for rank in (0, 1)]
    assert set(whole.scenes.index.tolist()) == set(torch.cat([h.scenes.index for h in halves]).tolist())
    assert whole.tensors["image"].shape == (8, 3, 64, 64) and whole.tensors["instance"].shape == (8, 64, 64)
    again = module._fill("train", 8, 0, 1, device)
    assert torch.equal(whole.tensors["image"], again.tensors["image"])


def test_moving_scenes_are_taken_at_different_moments() -> None:
    scenes = sample("motion", "train", 0, torch.arange(64))
    moved = _at_some_time(scenes)
    assert torch.equal(moved.index, scenes.index)
    moves = scenes.motion == 1  # moves left
    place = moved.position[moves, 0, 0] - scenes.position[moves, 0, 0]
    assert place.std() > 0.1
    still = sample("base", "train", 0, torch.arange(64))
    assert torch.equal(_at_some_time(still).position, still.position)


def test_twin_captions_are_wrong_in_few_words() -> None:
    tokenizer = str(Path(__file__).parents[2] / "data" / "world-base" / "tokenizer")
    _, tokens = write_captions("pairs", torch.arange(64), "train", 0, 2, tokenizer, twins=True)
    right, wrong = tokens["tokens"], tokens["twin_tokens"]
    assert right.shape == wrong.shape == (64, 2, right.shape[-1])
    different = (right != wrong).sum(-1)
    assert (different > 0).float().mean() > 0.8
    assert different.float().median() <= 4  # same wording
