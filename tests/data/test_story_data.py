"""Stories as training data: pairs that never come apart, sampling of captions and frames, bad samples, caches."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.data.decode import encode_video, read_video
from lit_gen.data.frames import fitted
from lit_gen.data.images import centre_crop
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.data.storage import store_again
from lit_gen.data.stories import (
    Stories,
    StorySample,
    check_story,
    sample_caption,
    segment_frames,
    some_sentences,
    split_sentences,
)
from lit_gen.data.write import write_index, write_tar
from lit_gen.errors import ShardError


def story(number: int) -> dict:
    captions = [{"level": "full", "text": f"One {number}. Two {number}. Three {number}."}]
    captions += [
        {"level": level, "text": f"{level} of {number}"} for level in ("partial", "full-short", "full-university")
    ]
    return {"id": number, "captions": captions}


def story_set(folder: Path, count: int = 20, damaged: tuple[int, ...] = (), odd: dict[int, dict] | None = None) -> Path:
    """Shards of 5; the frames of video i are 12 * i grey, brighter by two each frame; lengths differ."""
    folder.mkdir(parents=True)
    shards = []
    for first in range(0, count, 5):
        samples = []
        for i in range(first, min(first + 5, count)):
            grey = 12 * i + 2 * np.arange(6 + i % 3)
            pixels = np.broadcast_to(grey[:, None, None, None], (len(grey), 16, 16, 3)).astype(np.uint8)
            video = encode_video(np.ascontiguousarray(pixels))
            samples.append(
                {
                    "__key__": f"{i:06d}",
                    "mp4": b"no video" if i in damaged else video,
                    "json": json.dumps((odd or {}).get(i, story(i))).encode(),
                }
            )
        shards.append(write_tar(folder / f"{first:06d}.tar", samples))
    write_index(folder, "stories", shards, {})
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_stay_with_their_videos_whatever_is_damaged(tmp_path: Path, workers: int) -> None:
    data = Stories(
        str(story_set(tmp_path / "set", damaged=(3, 11))), batch_size=4, frames=4, workers=workers, tolerance=0.5
    )
    loader = data.train_dataloader()
    seen = Counter()
    for _ in range(3):
        for batch in loader:
            assert batch["video"].dtype == torch.uint8 and batch["video"].shape[2:] == (3, 16, 16)
            grey = batch["video"].float().mean((2, 3, 4))  # B F
            for row, number in enumerate(batch["video_id"].tolist()):
                assert abs(grey[row, 0].item() - 12 * number) < 6
                assert (grey[row].diff() > 0).all()
                assert batch["paragraph"][row] == story(number)["captions"][0]["text"]
                assert all(text.endswith(f" of {number}") for text in batch["captions"][row])
                assert [text.partition(" ")[0] for text in batch["captions"][row]] == batch["levels"][row]
                seen[number] += 1
    assert set(seen) == set(range(20)) - {3, 11} and len(loader.bad) == 2


def test_too_many_damaged_videos_are_an_error_that_names_one(tmp_path: Path) -> None:
    data = Stories(str(story_set(tmp_path / "set", damaged=(3, 11))), batch_size=4, frames=4)
    with pytest.raises(ShardError, match=r"2 of 20 samples cannot be read .* \.mp4 of 8 bytes"):
        for _ in range(3):
            list(data.train_dataloader())


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"id": "x"}, "no whole number `id`"),
        ({"captions": []}, "no `captions`"),
        ({"captions": [{"level": "full", "text": "  "}]}, "level full is empty"),
        ({"captions": [{"level": "full-short", "text": "x"}]}, "exactly one caption at level full"),
        ({"captions": [{"text": "x"}]}, "lacks `level` or `text`"),
    ],
)
def test_a_story_that_is_none_says_why(change: dict, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        check_story(story(1) | change)
    check_story(story(1))


def test_a_sample_without_video_says_so() -> None:
    with pytest.raises(BadSample, match="it has no video"):
        StorySample(4, None, True)({"json": story(0), "key": "a"}, np.random.default_rng(0))
    with pytest.raises(BadSample, match="not bytes F H W 3"):
        none = np.zeros((0, 4, 4, 3), np.uint8)
        StorySample(4, None, True)({"npy": none, "json": story(0), "key": "a"}, np.random.default_rng(0))


def test_one_frame_of_each_part() -> None:
    rng = np.random.default_rng(0)
    assert segment_frames(12, 4, None).tolist() == [1, 4, 7, 10]
    assert segment_frames(3, 6, None).tolist() == [0, 0, 1, 1, 2, 2]
    drawn = np.array([segment_frames(12, 4, rng) for _ in range(300)])
    for part in range(4):
        assert set(drawn[:, part]) == set(range(3 * part, 3 * part + 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_videos_of_one_id_are_refused(tmp_path: Path, workers: int) -> None:
    odd = Stories(str(story_set(tmp_path / "set", odd={7: story(3)})), batch_size=5, frames=2, workers=workers)
    why = r"000000.tar/000003 and 000005.tar/000007 both have the id 3"
    with pytest.raises(ShardError, match=why):
        odd.look_through(ShardSet.open(tmp_path / "set"))
    with pytest.raises(ShardError, match=why):
        store_again(tmp_path / "set", tmp_path / "again", 2, 16, "npy")
    with pytest.raises(ShardError, match="both have the id 3"):
        for _, _batch in zip(range(4), odd.train_dataloader(), strict=False):
            pass
    again = Stories(str(story_set(tmp_path / "plain", count=5)), batch_size=5, frames=2, workers=workers)
    loader = again.train_dataloader()
    assert [len(list(loader)) for _ in range(2)] == [1, 1]  # a second pass shows no other videos


def test_captions_are_drawn_by_axis_then_level() -> None:
    captions = [{"level": "full", "text": "p"}, {"level": "partial", "text": "a"}]
    captions += [{"level": "full-short", "text": f"b{i}"} for i in range(6)] + [{"level": "partial-long", "text": "c"}]
    rng = np.random.default_rng(0)
    counts = Counter(sample_caption(captions, rng)["level"] for _ in range(2000))
    assert counts["partial"] == pytest.approx(1000, abs=100)
    assert counts["full-short"] == pytest.approx(500, abs=80) and counts["partial-long"] == pytest.approx(500, abs=80)
    assert sample_caption(captions[:1], rng)["text"] == "p"


def test_sentences_of_a_paragraph_are_left_out_in_order() -> None:
    paragraph = "One a. Two b. Three c. Four d."
    assert split_sentences(paragraph) == ["One a.", "Two b.", "Three c.", "Four d."]
    assert split_sentences("Look!  A 3.5 m ball? It rolls") == ["Look!", "A 3.5 m ball?", "It rolls."]
    rng = np.random.default_rng(0)
    found = {some_sentences(paragraph, rng) for _ in range(600)}
    assert paragraph in found and "One a. Three c." in found and "Two b." in found and len(found) == 15
    assert all(text.split() == [w for w in paragraph.split() if w in text.split()] for text in found)


def test_world_stories_are_built_with_all_their_captions(tmp_path: Path) -> None:
    from lit_gen.data.build import build
    from lit_gen.world.stories.tell import LEVELS, WORDINGS

    for split in ("train", "val"):
        (tmp_path / f"{split}.yaml").write_text(
            f"kind: stories\nrecipe: events\nsplit: {split}\ncount: 3\nframes: 2\nsize: 16\nsamples_per_shard: 2\n"
        )
        build(tmp_path / f"{split}.yaml", workers=1)
    train, val = (ShardSet.open(tmp_path / f"{split}.yaml") for split in ("train", "val"))
    told = json.loads(train.read(1, {"json"})[1]["json"])
    assert {c["level"] for c in told["captions"]} == set(LEVELS) and not any("wording" in c for c in told["captions"])
    tested = json.loads(val.read(2, {"json"})[1]["json"])
    assert tested["id"] == 2 and Counter(c.get("wording", "seen") for c in tested["captions"]) == {
        wording: len(LEVELS) for wording in WORDINGS
    }
    assert all(len(c["paraphrases"]) == 2 for c in tested["captions"] if "wording" not in c)
    data = Stories(test=str(tmp_path / "val.yaml"), batch_size=2, frames=4)
    batches = list(data.test_dataloader())
    assert [b["valid"].tolist() for b in batches] == [[True, True], [True, False]]
    assert batches[0]["video"].shape == (2, 4, 3, 16, 16) and torch.is_tensor(batches[0]["video_id"])


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (40, 20), (10, 12)])
def test_frames_are_cropped_as_pictures_are(shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(256, size=(2, *shape, 3), dtype=np.uint8)
    expected = [np.asarray(centre_crop(Image.fromarray(frame), 16)) for frame in frames]
    assert np.array_equal(fitted(frames, 16), expected)


def test_ordinary_videos_of_the_world_and_sets_from_before_the_choice(tmp_path: Path) -> None:
    from lit_gen.data.build import build

    text = "kind: stories\nrecipe: events\nsplit: train\ncount: 1\nframes: 4\nsize: 32\n"
    (tmp_path / "exact.yaml").write_text(text)
    (tmp_path / "ordinary.yaml").write_text(text + "mp4: ordinary\n")
    assert "mp4" not in SetFile.read(tmp_path / "exact.yaml").description
    videos = {}
    for name in ("exact", "ordinary"):
        data = ShardSet.open(build(tmp_path / f"{name}.yaml", workers=1)).read(0, {"mp4"})[1]["mp4"]
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            videos[name] = stream.pix_fmt, float(stream.average_rate), stream.has_b_frames, read_video(data)
    assert videos["exact"][:3] == ("yuv444p", 8, False)
    assert videos["ordinary"][:2] == ("yuv420p", 30) and videos["ordinary"][2]
    apart = np.abs(videos["exact"][3].astype(int) - videos["ordinary"][3])
    assert 0 < apart.mean() < 12
