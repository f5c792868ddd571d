import logging
from collections import Counter

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from shard_sets import image_set

from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from lit_gen.data import images
from lit_gen.data.decode import decode, encode_image
from lit_gen.data.images import ImageSample
from lit_gen.data.loader import ShardLoader
from lit_gen.data.mixed import MixedLoader
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.data.styled import StyleSample
from lit_gen.errors import ShardError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("sets") / "grey")  # 22 samples in shards of 7, 5, 6, 4


def make(folder, batch_size=3, transform=None, **options) -> ShardLoader:
    return ShardLoader(ShardSet.open(folder), transform or ImageSample(), images.EXTENSIONS, batch_size, **options)


def numbers(batch) -> list[int]:
    """Which samples a batch holds, told by the pixels; caption, name and facts must tell the same."""
    seen = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert batch["caption"] == [f"sample {i}" for i in seen]
    assert [f["i"] for f in batch["facts"]] == seen
    assert [int(key.split("/")[1]) for key in batch["key"]] == seen
    return seen


def take(loader, count) -> list[list[int]]:
    """The next `count` batches, across epochs."""
    found = []
    while len(found) < count:
        for batch in loader:
            found.append(numbers(batch))
            if len(found) == count:
                break
    return found


def test_every_sample_comes_exactly_once_per_epoch_of_samples(folder):
    seen = [i for batch in take(make(folder, batch_size=4), 11) for i in batch]  # 44 = 2 epochs
    assert sorted(seen[:22]) == sorted(seen[22:]) == list(range(22))
    assert seen[:22] != seen[22:] != list(range(22))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_every_sample_and_have_equally_many_batches(folder, world):
    loaders = [make(folder, rank=rank, world=world, batch_size=2) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    epochs = [take(loader, 22) for loader in loaders]  # 22 * 2 * world samples: whole epochs
    stream = [i for step in zip(*epochs, strict=True) for batch in step for i in batch]
    for start in range(0, len(stream), 22):
        assert sorted(stream[start : start + 22]) == list(range(22))


def test_order_depends_on_the_seed_alone(folder):
    assert take(make(folder, seed=1), 9) == take(make(folder, seed=1), 9) != take(make(folder, seed=2), 9)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    style = StyleSample(size=8)  # random crops too
    alone = make(folder, transform=style)
    shared = make(folder, transform=style, workers=workers)
    for _ in range(2):  # two epochs
        for a, b in zip(alone, shared, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("stop", range(0, 16))  # an epoch has 7 batches: within, at and beyond its border
def test_resumes_at_any_batch(folder, stop):
    straight = take(make(folder), 20)
    first = make(folder)
    assert take(first, stop) == straight[:stop]
    state = first.state_dict()
    assert state["samples"] == 3 * stop
    second = make(folder)
    second.load_state_dict(state)
    assert take(second, 20 - stop) == straight[stop:]


class Counting(L.LightningModule):
    """Notes the epoch of every batch and of every validation."""

    def __init__(self):
        super().__init__()
        self.line, self.batches, self.validated, self.steps = torch.nn.Linear(1, 1), Counter(), [], []

    def training_step(self, batch, batch_idx):
        self.batches[self.current_epoch] += 1
        return self.line(torch.ones(1, 1)).sum()

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(sum(self.batches.values()))

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def counted(folder, place, batch_size, ckpt=None, callbacks=(), **settings):
    module = Counting()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=place,
        num_sanity_val_steps=0, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], **settings,
    )  # fmt: skip
    trainer.fit(module, make(folder, batch_size), make(folder, 22, shuffle=False), ckpt_path=ckpt)
    return module


def test_epochs_may_be_limited(folder, tmp_path):
    module = counted(folder, tmp_path, 3, max_epochs=5, limit_train_batches=4, accumulate_grad_batches=2)
    assert module.batches == {epoch: 4 for epoch in range(5)} and module.validated == list(range(5))
    assert module.steps == list(range(2, 21, 2))


@pytest.mark.parametrize(
    "batch_size, ranks, done, now, accumulate, rest",
    [
        (3, 1, 4, 3, 1, {0: 3, 1: 7}),  # as before
        (4, 2, 12, 2, 1, {2: 7, 3: 11}),  # two ranks and then one, in the third epoch: 2 of 5 batches are 4 of 11
        (2, 0.5, 10, 4, 1, {0: 1, 1: 5}),  # one and then two: at least a batch is left of an epoch that is not over
        (2, 0.5, 6, 4, 2, {0: 3, 1: 5}),  # 3 of 5 batches are done, of which a step takes two
    ],
)
def test_an_epoch_goes_on_with_the_rest_of_its_batches(
    folder, tmp_path, batch_size, ranks, done, now, accumulate, rest
):
    """On one rank in truth, with batches as large as those of several together."""
    settings = {"accumulate_grad_batches": accumulate}
    stop = done // accumulate
    counted(folder, tmp_path, batch_size, max_steps=stop, callbacks=[Checkpoint(every_n_steps=stop)], **settings)
    saved = torch.load(tmp_path / f"checkpoints/step-{stop:08d}.ckpt", weights_only=True)
    torch.save(saved | {"world_size": ranks}, tmp_path / "given.ckpt")
    again = {"max_epochs": max(rest) + 1, "callbacks": [Checkpoint(every_n_steps=10**6)], **settings}
    module = counted(folder, tmp_path, now, tmp_path / "given.ckpt", **again)
    assert module.batches == rest and sorted(set(module.validated)) == sorted(rest)
    assert module.steps[0] == accumulate


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_with_workers_that_have_read_ahead(folder, workers):
    straight = take(make(folder), 12)
    first = make(folder, workers=2)
    take(first, 5)
    second = make(folder, workers=workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == straight[5:]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_resumes_on_another_number_of_ranks(folder, before, after):
    def run(loaders, steps):
        batches = [take(loader, steps) for loader in loaders]
        return [i for step in zip(*batches, strict=True) for batch in step for i in batch]

    loaders = [make(folder, batch_size=1, rank=r, world=before) for r in range(before)]
    seen = run(loaders, 12 // before)
    state = loaders[0].state_dict()
    resumed = [make(folder, batch_size=1, rank=r, world=after) for r in range(after)]
    for loader in resumed:
        loader.load_state_dict(state)
    seen += run(resumed, 10 // after)
    assert sorted(seen) == list(range(22))


def test_refuses_the_state_of_another_set_or_seed(folder, tmp_path):
    with pytest.raises(ShardError, match="another seed"):
        make(folder, seed=1).load_state_dict(make(folder, seed=2).state_dict())
    other = image_set(tmp_path / "other", (7, 5, 6, 5))
    with pytest.raises(ShardError, match="another set"):
        make(folder).load_state_dict(make(other).state_dict())


def test_training_random_numbers_are_left_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(make(folder, workers=1), 3)
    assert torch.equal(torch.rand(3), expected)


def test_a_set_smaller_than_a_global_batch_still_gives_full_batches(folder):
    loader = make(folder, batch_size=30)
    (batch,) = loader
    assert len(loader) == 1 and set(numbers(batch)) == set(range(22))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_scores_each_sample_once(folder, workers):
    loaders = [make(folder, 4, shuffle=False, rank=rank, world=2, workers=workers) for rank in range(2)]
    for _ in range(2):  # every pass is the same
        batches = [list(loader) for loader in loaders]
        assert [len(b) for b in batches] == [3, 3]
        scored = [
            i
            for rank in batches
            for batch in rank
            for i, valid in zip(numbers(batch), batch["valid"], strict=True)
            if valid
        ]
        assert sorted(scored) == list(range(22))
    assert numbers(batches[0][0]) == [0, 1, 2, 3]


def damage(folder, tmp_path, edit):
    """A copy of the set with one shard's bytes edited."""
    copy = image_set(tmp_path / "damaged")
    file = copy / "000001.tar"
    file.write_bytes(edit(bytearray(file.read_bytes())))
    return copy


def corrupt_one_picture(data: bytearray) -> bytearray:
    at = data.index(b"IDAT", data.index(b"IDAT") + 1)  # of the shard's second sample, which is sample 8
    data[at + 4 : at + 20] = bytes(16)
    return data


def test_no_flipped_bit_of_a_picture_changes_it_unseen():
    speckled = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    whole = encode_image(speckled)
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        try:
            seen = np.asarray(decode("png", bytes(flipped)))
        except BadSample:
            continue
        assert np.array_equal(seen, speckled), place


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture_is_replaced_counted_and_named(folder, tmp_path, workers, caplog):
    loader = make(damage(folder, tmp_path, corrupt_one_picture), 2, tolerance=0.1, workers=workers)
    with caplog.at_level(logging.WARNING, logger="lit_gen"):
        seen = [i for batch in take(loader, 11) for i in batch]
    assert len(seen) == 22 and set(seen) == set(range(22)) - {8}
    assert list(loader.bad) == ["000001.tar/000008"] and "png" in loader.bad["000001.tar/000008"]
    assert sum("000001.tar/000008" in record.getMessage() for record in caplog.records) == 1


def test_replacement_keeps_the_rest_of_the_order(folder, tmp_path):
    whole = [i for batch in take(make(folder, 2), 22) for i in batch]
    damaged = [
        i for batch in take(make(damage(folder, tmp_path, corrupt_one_picture), 2, tolerance=1), 22) for i in batch
    ]
    assert [b for a, b in zip(whole, damaged, strict=True) if a != 8] == [a for a in whole if a != 8]


def test_evaluation_masks_an_unreadable_sample(folder, tmp_path):
    loader = make(damage(folder, tmp_path, corrupt_one_picture), 22, shuffle=False, tolerance=0.1)
    (batch,) = loader
    assert [i for i, valid in enumerate(batch["valid"]) if not valid] == [8]


def test_a_truncated_shard_costs_only_its_lost_samples(folder, tmp_path):
    loader = make(damage(folder, tmp_path, lambda data: data[: len(data) // 2]), 2, tolerance=1)
    seen = [i for batch in take(loader, 11) for i in batch]
    lost = set(range(22)) - set(seen)
    assert lost and lost < set(range(7, 12)) and len(loader.bad) == len(lost)
    assert any("truncated" in reason for reason in loader.bad.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_end_in_one_line_that_names_the_first(folder, tmp_path, workers):
    loader = make(damage(folder, tmp_path, corrupt_one_picture), 2, workers=workers)
    with pytest.raises(ShardError, match=r"1 of 22 samples cannot be read .*000001.tar/000008: .png") as caught:
        take(loader, 11)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_the_wanted_member_ends_in_one_line(folder, workers):
    loader = make(folder, workers=workers, tolerance=1)
    loader._batches.extensions = {"txt"}
    with pytest.raises(ShardError, match="none of the members png, jpg") as caught:
        take(loader, 1)
    assert "\n" not in str(caught.value)


def test_mixed_steps_agree_between_ranks_and_resume(folder, tmp_path):
    other = image_set(tmp_path / "other", (10, 10))

    def mixed(rank=0, world=1):
        return MixedLoader(make(folder, 2, rank=rank, world=world), make(other, 1, rank=rank, world=world), 0.3, seed=4)

    straight = take(mixed(), 60)
    assert [len(batch) for batch in straight] == [2 if mixed().takes_first(step) else 1 for step in range(60)]
    assert 0.15 < sum(len(batch) == 2 for batch in straight) / 60 < 0.45
    assert [[len(b) for b in take(mixed(rank, 2), 30)] for rank in range(2)] == [[len(b) for b in straight[:30]]] * 2
    for stop in (1, 17, 29, 41):
        first, second = mixed(), mixed()
        take(first, stop)
        second.load_state_dict(first.state_dict())
        assert take(second, 60 - stop) == straight[stop:]
