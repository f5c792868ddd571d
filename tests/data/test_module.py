import json

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import image_set, picture, video_set

from lit_gen.data.decode import encode_image
from lit_gen.data.images import centre_crop
from lit_gen.data.module import Images, ImagesAndVideos, StyledImages, Videos
from lit_gen.data.styled import strip_style
from lit_gen.data.write import write_index, write_tar
from lit_gen.errors import ShardError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("module") / "grey")


class Recorder(L.LightningModule):
    """Remembers which samples each step saw; the weight depends on all of them."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.stop_at = [], [], stop_at

    def training_step(self, batch, _):
        self.seen.append(tuple(batch["caption"]))
        if len(self.seen) == self.stop_at:
            raise RuntimeError("killed")  # in the middle of a step
        return (self.weight - batch["image"].mean()).square()

    def validation_step(self, batch, _):
        self.validated += [c for c, valid in zip(batch["caption"], batch["valid"], strict=True) if valid]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(model, data, root, steps, resume=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[L.callbacks.ModelCheckpoint(root, "step{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    trainer.fit(model, data, ckpt_path=resume)


# Steps are of two batches where gradients accumulate; epochs are of 7 batches.
@pytest.mark.parametrize("stop, accumulate", [(4, 1), (7, 1), (9, 1), (3, 2)])
def test_a_fit_resumes_with_the_very_next_batch(folder, tmp_path, stop, accumulate):
    def data():
        return Images(train=str(folder), val=str(folder), batch_size=3, seed=3)

    straight = Recorder()
    fit(straight, data(), tmp_path / "a", 10, accumulate_grad_batches=accumulate)
    broken = Recorder(stop_at=stop * accumulate + 1)
    with pytest.raises(RuntimeError, match="killed"):
        fit(broken, data(), tmp_path / "b", 10, accumulate_grad_batches=accumulate)
    resumed = Recorder()
    fit(resumed, data(), tmp_path / "b", 10, tmp_path / f"b/stepstep={stop}.ckpt", accumulate_grad_batches=accumulate)
    assert resumed.seen == straight.seen[stop * accumulate :]
    assert torch.equal(resumed.weight, straight.weight)
    assert sorted(straight.validated[-22:]) == sorted(f"sample {i}" for i in range(22))


def test_images_are_scaled_and_cropped(folder):
    loader = Images(train=str(folder), batch_size=22, size=4).train_dataloader()
    (batch,) = loader
    assert batch["image"].shape == (22, 3, 4, 4)
    greys = [float(f["i"]) / 127.5 - 1 for f in batch["facts"]]
    assert torch.allclose(batch["image"].mean((1, 2, 3)), torch.tensor(greys))


def test_pictures_of_different_shapes_need_a_size(tmp_path):
    samples = [{"__key__": str(i), "png": encode_image(picture(i, 8 + i)), "txt": b"x"} for i in range(2)]
    tmp_path.joinpath("set").mkdir()
    write_index(tmp_path / "set", "images", [write_tar(tmp_path / "set/0.tar", samples)], {})
    with pytest.raises(ShardError, match="differ in the shape of image: .*set `size`"):
        next(iter(Images(train=str(tmp_path / "set"), batch_size=2).train_dataloader()))
    batch = next(iter(Images(train=str(tmp_path / "set"), batch_size=2, size=8).train_dataloader()))
    assert batch["facts"] == [{}, {}] and batch["image"].shape == (2, 3, 8, 8)


def frame_numbers(batch) -> list[list[int]]:
    """Frame f of clip i is grey value 8 f + i."""
    greys = ((batch["video"].mean((2, 3, 4)) + 1) * 127.5).round().int()
    return [[(g - int(key.split("/")[1]) + 4) // 8 for g in row] for row, key in zip(greys, batch["key"], strict=True)]


def test_videos_give_consecutive_frames_from_a_place_that_is_reproducible(tmp_path):
    source = str(video_set(tmp_path / "clips"))
    whole = next(iter(Videos(train=source, batch_size=6).train_dataloader()))
    assert whole["video"].shape == (6, 8, 3, 16, 16) and frame_numbers(whole) == [list(range(8))] * 6
    cut = Videos(train=source, val=source, batch_size=6, frames=3, stride=2, size=8)
    first, again = (frame_numbers(next(iter(cut.train_dataloader()))) for _ in range(2))
    assert first == again and len({row[0] for row in first}) > 1
    assert all(row == [row[0], row[0] + 2, row[0] + 4] for row in first)
    assert frame_numbers(next(iter(cut.val_dataloader()))) == [[1, 3, 5]] * 6
    with pytest.raises(ShardError, match="has 8 frames, 9 are needed"):
        next(iter(Videos(train=source, frames=9).train_dataloader()))


def test_frames_are_cropped_to_a_rectangle_and_cover_it(tmp_path):
    source = str(video_set(tmp_path / "clips"))
    batch = next(iter(Videos(train=source, batch_size=6, size=(10, 24)).train_dataloader()))
    assert batch["video"].shape == (6, 8, 3, 10, 24) and frame_numbers(batch) == [list(range(8))] * 6
    assert Videos(size=(10, 24)).preprocessing() == {"size": [10, 24]} and Videos(size=4).preprocessing() == {"size": 4}
    rows = Image.fromarray(np.arange(16, dtype=np.uint8)[:, None].repeat(16, 1) * 16)
    cut = np.asarray(centre_crop(rows, (8, 16)))
    assert np.array_equal(cut, np.asarray(rows)[4:12])  # the middle, and nothing stretched
    with pytest.raises(UserError, match="`size` must be at least 1, not 0"):
        Videos(size=(0, 24))


def test_a_video_that_lost_frames_is_replaced(tmp_path):
    source = video_set(tmp_path / "clips", lost={2: 5})
    index = json.loads((source / "index.json").read_text())
    (source / "index.json").write_text(json.dumps(index | {"description": {"frames": 8}}))
    loader = Videos(train=str(source), batch_size=6, tolerance=0.5).train_dataloader()
    assert next(iter(loader))["video"].shape == (6, 8, 3, 16, 16)
    assert loader.bad == {"000000.tar/2": "the video has 5 of 8 frames"}


@pytest.fixture
def gradients(tmp_path):
    """Pictures whose red is x and green is y, so that a crop tells where it was taken."""
    size = 64
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pixels = torch.stack([x * 4, y * 4, torch.zeros_like(x)], -1).byte().numpy()
    facts = json.dumps({"style_parameters": [0.25, 0.5]}).encode()
    text = b"a painting of a red ball"
    samples = [{"__key__": str(i), "png": encode_image(pixels), "txt": text, "json": facts} for i in range(4)]
    (tmp_path / "set").mkdir()
    write_index(tmp_path / "set", "style", [write_tar(tmp_path / "set/0.tar", samples)], {})
    return str(tmp_path / "set")


def test_style_reference_is_a_random_crop_of_the_enlarged_target(gradients):
    loader = StyledImages(train=gradients, batch_size=4, seed=1).train_dataloader()
    batch, later = next(iter(loader)), next(iter(loader))
    assert batch["image"].shape == batch["style"].shape == (4, 3, 64, 64)
    assert torch.equal(batch["style_parameters"], torch.tensor([[0.25, 0.5]] * 4))
    assert batch["caption"] == ["a red ball"] * 4

    def extent(pictures, channel):
        pixels = (pictures[:, channel] + 1) / 2
        return pixels.amax((1, 2)) - pixels.amin((1, 2))

    for channel in (0, 1):
        ratio = extent(batch["style"], channel) / extent(batch["image"], channel)
        assert torch.allclose(ratio, torch.full((4,), 512 / 800), atol=0.03)
    corners = [tuple(p[:2, 0, 0].tolist()) for b in (batch, later) for p in b["style"]]
    assert len(set(corners)) > 4  # crops differ between samples and between epochs


def test_the_ablation_without_decoupling_shows_the_target_itself(gradients):
    batch = next(iter(StyledImages(train=gradients, zoom=1, strip_style=False).train_dataloader()))
    assert torch.equal(batch["image"], batch["style"]) and batch["caption"][0] == "a painting of a red ball"


@pytest.mark.parametrize(
    "caption, stripped",
    [
        ("a watercolor painting of a dog on grass", "a dog on grass"),
        ("a picture of a painting of two boats", "two boats"),
        ("painting - a castle", "a castle"),
        ("black and white photograph - a street", "a street"),
        ("a cat, in an oil painting", "a cat"),
        ("a cat in watercolor", "a cat"),
        ("a red ball left of a blue cube", "a red ball left of a blue cube"),
    ],
)
def test_words_of_the_medium_are_stripped(caption, stripped):
    assert strip_style(caption) == stripped
    assert strip_style(caption, "paper") == stripped and strip_style(caption, "none") == caption


@pytest.mark.parametrize(
    "caption, careful, paper",
    [
        ("a very detailed and quite colorful oil painting of a dog", "a dog", "a dog"),
        ("a dog in a very old and faded photograph", "a dog", "a dog"),
        ("a very old, cracked, faded mural of two men", "two men", "two men"),
        ("a dog in the picture", "a dog", "a dog"),
        ("a room with a view of the sea", "a room with a view of the sea", "the sea"),
        ("a man holding a drawing of a cat", "a man holding a drawing of a cat", "a cat"),
        ("a girl in a red hat painting a wall", "a girl in a red hat painting a wall", "a girl a wall"),
        ("a dog in a park next to a mural", "a dog in a park next to a mural", "a dog"),
        ("illustration - a castle", "a castle", "illustration - a castle"),
    ],
)
def test_the_papers_rules_take_content_that_careful_ones_leave(caption, careful, paper):
    assert strip_style(caption) == careful
    assert strip_style(caption, "paper") == paper


@pytest.mark.parametrize("setting, rules", [(True, "careful"), (False, "none"), ("paper", "paper")])
def test_rules_are_a_word_or_whether_any(gradients, setting, rules):
    data = StyledImages(train=gradients, strip_style=setting)
    assert data.preprocessing()["strip_style"] == rules
    caption = next(iter(data.train_dataloader()))["caption"][0]
    assert caption == ("a painting of a red ball" if rules == "none" else "a red ball")


def test_images_and_videos_come_mixed(folder, tmp_path):
    videos = Videos(train=str(video_set(tmp_path / "clips")), batch_size=2)
    for wrong in (-0.5, 1.0):
        with pytest.raises(UserError, match=f"`image_probability` must be at least 0 and below 1, not {wrong}"):
            ImagesAndVideos(Images(train=str(folder)), videos, image_probability=wrong)
    data = ImagesAndVideos(Images(train=str(folder), batch_size=4), videos, image_probability=0.5, seed=1)
    kinds = ["image" if "image" in batch else "video" for _ in range(5) for batch in data.train_dataloader()]
    assert {"image", "video"} == set(kinds) and len(data.train_dataloader()) == 6


def test_a_set_of_the_wrong_kind_or_none_is_one_line(folder):
    with pytest.raises(ShardError, match="is a set of images; Videos reads videos"):
        Videos(train=str(folder)).train_dataloader()
    with pytest.raises(ShardError, match="Images has no train set: name one with data.init_args.train"):
        Images().train_dataloader()


def test_only_what_a_verb_reads_is_built(tmp_path):
    for name in ("train", "val", "test"):
        content = {"kind": "images", "recipe": "photo", "split": name, "count": 2, "size": 16}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    data = Images(*(str(tmp_path / f"{name}.yaml") for name in ("train", "val", "test")), batch_size=2)
    model = Recorder()
    fit(model, data, tmp_path / "run", 1)
    assert {f.name for f in (tmp_path / "shards").iterdir() if f.is_dir()} == {"train", "val"}
    assert len(model.seen) == 1 and len(model.validated) >= 2
