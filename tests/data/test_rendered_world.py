"""Scenes rendered on the training device."""

from pathlib import Path

import pytest
import torch

from lit_gen.data.captions import write_captions
from lit_gen.data.world import Draws, RenderedWorld
from lit_gen.errors import UserError
from lit_gen.metrics.clip import CLIPEncoders
from lit_gen.world.combinations import is_held_out
from lit_gen.world.render import render
from lit_gen.world.sampling import sample


def stream(loader: Draws, batches: int) -> list[tuple[int, int]]:
    """Numbers in the pool of the next batches, with the random number of each."""
    found = []
    while len(found) < batches * loader.batch_size:
        for batch in loader:
            index = batch["rows"] * loader.world + loader.rank
            found += zip(index.tolist(), batch["draws"].tolist(), strict=True)
            if len(found) == batches * loader.batch_size:
                break
    return found


def test_draws_are_permutations_and_resume_anywhere() -> None:
    straight = stream(Draws(40, 3, seed=5), 30)
    assert sorted(index for index, _ in straight[:40]) == sorted(index for index, _ in straight[40:80]) == [*range(40)]
    assert straight[:40] != straight[40:80] and [i for i, _ in straight[:40]] != [*range(40)]
    for stop in (1, 5, 12, 13, 14, 29):
        first, second = Draws(40, 3, seed=5), Draws(40, 3, seed=5)
        seen = stream(first, stop)
        second.load_state_dict(first.state_dict())
        assert seen + stream(second, 30 - stop) == straight


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (4, 2), (1, 4)])
def test_another_number_of_ranks_continues_the_same_stream(worlds: tuple[int, int]) -> None:
    straight = stream(Draws(64, 1, seed=1), 192)
    before, after = ([Draws(64, 2, seed=1, rank=r, world=w) for r in range(w)] for w in worlds)
    seen = [sample for loader in before for sample in stream(loader, 7)]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    seen += [sample for loader in after for sample in stream(loader, (192 - len(seen)) // (2 * worlds[1]))]
    assert len(set(seen)) > 150 and sorted(seen) == sorted(straight[: len(seen)])


def test_validation_draws_everything_in_order() -> None:
    batches = list(Draws(10, 4, seed=0, shuffle=False))
    assert [len(b["rows"]) for b in batches] == [4, 4, 2]
    assert torch.cat([b["rows"] for b in batches]).tolist() == [*range(10)]


def test_ranks_render_disjoint_shares_of_one_pool() -> None:
    module = RenderedWorld(recipes={"base": 0.5, "motion": 0.5}, captions=1, masks=True, workers=0, seed=3)
    device = torch.device("cpu")
    whole = module._fill("train", 8, 0, 1, device)
    halves = [module._fill("train", 8, rank, 2, device) for rank in (0, 1)]
    assert [h.scenes.index.tolist() for h in halves] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert torch.equal(torch.stack([h.tensors["image"] for h in halves], 1).flatten(0, 1), whole.tensors["image"])
    assert whole.tensors["image"].shape == (8, 3, 64, 64) and whole.tensors["instance"].shape == (8, 64, 64)
    again = module._fill("train", 8, 0, 1, device)
    assert torch.equal(whole.tensors["image"], again.tensors["image"])


def test_a_share_of_the_training_pool_is_held_out_elsewhere() -> None:
    module = RenderedWorld(recipes={"pairs": 0.5, "styled": 0.5}, captions=1, workers=0, seed=3, held_out=0.25)
    device = torch.device("cpu")
    found = module._fill("train", 16, 0, 1, device).scenes
    assert is_held_out(found)[:, 0].tolist() == 2 * ([False] * 6 + [True] * 2)
    assert not is_held_out(module._fill("val", 16, 0, 1, device).scenes).any()
    halves = [module._fill("train", 16, rank, 2, device).scenes.index.tolist() for rank in (0, 1)]
    assert sorted(sum(halves, [])) == [*range(16)]
    with pytest.raises(UserError, match="held_out is a share of the pool"):
        RenderedWorld(held_out=30)


def test_pictures_of_moving_scenes_are_first_frames() -> None:
    pictures, clips = (RenderedWorld(recipes={"motion": 1.0}, frames=frames, workers=0) for frames in (1, 8))
    device = torch.device("cpu")
    first = clips._fill("train", 16, 0, 1, device).tensors["video"][:, 0]
    assert torch.equal(pictures._fill("train", 16, 0, 1, device).tensors["image"], first)
    still, index = RenderedWorld(recipes={"base": 1.0}, workers=0), torch.arange(8)
    drawn = (render(sample("base", "train", 0, index)).rgb.clamp(0, 1) * 255).round().byte()
    assert torch.equal(still._fill("train", 8, 0, 1, device).tensors["image"], drawn)


def test_twin_captions_are_wrong_in_few_words() -> None:
    tokenizer = str(Path(__file__).parents[2] / "data" / "world-base" / "tokenizer")
    _, tokens = write_captions("pairs", torch.arange(64), "train", 0, 2, tokenizer, twins=True)
    right, wrong = tokens["tokens"], tokens["twin_tokens"]
    assert right.shape == wrong.shape == (64, 2, right.shape[-1])
    different = (right != wrong).sum(-1)
    assert (different > 0).float().mean() > 0.8
    assert different.float().median() <= 4  # same wording


def test_image_embeddings_are_the_image_encoders(tiny_base: Path) -> None:
    module = RenderedWorld(workers=0, seed=3, clip=str(tiny_base))
    found = module._fill("val", 6, 0, 1, torch.device("cpu")).tensors
    own = CLIPEncoders(tiny_base).embed_image(found["image"] / 127.5 - 1)
    torch.testing.assert_close(found["image_embedding"], own, atol=0.02, rtol=0)  # of pictures before rounding
