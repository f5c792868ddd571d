import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen.data import build as building
from lit_gen.data.build import build, first_sample
from lit_gen.data.command import main
from lit_gen.data.decode import encode_video, read_image, read_video
from lit_gen.data.facts import facts_from_scenes, scenes_from_facts
from lit_gen.data.frames import read_frames
from lit_gen.data.images import to_tensor
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import ShardSet
from lit_gen.errors import ShardError
from lit_gen.world.grammar import captions
from lit_gen.world.render import render, render_video
from lit_gen.world.sampling import sample

SET = {
    "kind": "style",
    "recipe": "styled",
    "split": "train",
    "count": 10,
    "seed": 5,
    "size": 32,
    "samples_per_shard": 4,
}


def set_file(folder: Path, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(SET | changes))
    return file


def sums(folder: Path) -> list[str]:
    return [s.sha256 for s in ShardSet.open(folder).shards]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build(set_file(tmp_path_factory.mktemp("built")), workers=1)


@pytest.mark.parametrize("kind", ["style", "videos", "stories"])
def test_the_first_sample_is_that_of_the_set(kind, tmp_path):
    recipe = {"style": "styled", "videos": "motion", "stories": "base"}[kind]
    file = set_file(tmp_path, kind=kind, recipe=recipe, count=2, samples_per_shard=2, frames=2)
    (tmp_path / "one").mkdir()
    one = first_sample(SetFile.read(file), tmp_path / "one")
    assert (len(one), one.kind, one.source) == (1, kind, str(file))
    build(file, workers=1)
    extensions = {"png", "mp4", "txt", "json"}
    assert one.read(0, extensions) == ShardSet.open(file).read(0, extensions)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "videos", "recipe": "motion", "frames": 1}, "frames must be at least 2"),
        ({"kind": "stories", "recipe": "base", "size": 63, "mp4": "ordinary"}, "size must be even"),
    ],
)
def test_what_cannot_be_rendered_is_said_of_the_file(wrong, message, tmp_path):
    with pytest.raises(ShardError, match=message):
        SetFile.read(set_file(tmp_path, **wrong))


def test_facts_rebuild_the_scenes_exactly():
    scenes = sample("base", "train", 3, torch.arange(200))
    facts = json.loads(json.dumps(facts_from_scenes(scenes)))
    again = scenes_from_facts(facts)
    for f in fields(scenes):
        before, after = getattr(scenes, f.name), getattr(again, f.name)
        assert before.dtype == after.dtype and torch.equal(before, after), f.name


def test_shards_hold_the_world_s_pictures_words_and_truth(built):
    shards = ShardSet.open(built)
    assert [s.samples for s in shards.shards] == [4, 4, 2] and shards.kind == "style"
    scenes = sample("styled", "train", 5, torch.arange(10))
    rgb = render(scenes, size=32).rgb
    texts = captions(scenes, seed=5)
    for i in range(10):
        name, members = shards.read(i, {"png", "txt", "json"})
        assert name.endswith(f"/{i:08d}") and members["txt"].decode() == texts[i].text
        assert json.loads(members["json"])["index"] == i
        # Rounding to bytes; a scene rendered in another batch differs by float rounding.
        stored = (to_tensor(read_image(members["png"])) + 1) / 2
        assert (stored - rgb[i]).abs().max() < 2.5 / 255


def test_videos_are_nearly_lossless(tmp_path):
    file = set_file(tmp_path, kind="videos", recipe="motion", count=2, frames=5, size=64)
    _, members = ShardSet.open(build(file, workers=1)).read(1, {"mp4"})
    video = (to_tensor(read_video(members["mp4"])) + 1) / 2
    truth = render_video(sample("motion", "train", 5, torch.arange(2)), frames=5, size=64).rgb[1]
    assert video.shape == truth.shape == (5, 3, 64, 64)
    assert -10 * torch.log10((video - truth).square().mean()) > 38  # dB


def test_videos_are_encoded_to_the_same_bytes():
    speckled = np.random.default_rng(0).integers(0, 90, (8, 64, 64, 3)).astype(np.uint8)
    assert len({encode_video(speckled) for _ in range(30)}) == 1


def test_two_processes_write_the_same_bytes_as_one(built, tmp_path):
    assert sums(build(set_file(tmp_path), workers=2)) == sums(built)


def test_a_complete_set_is_not_built_again(built, monkeypatch, capsys):
    monkeypatch.setattr(building, "_rendered", lambda *_: pytest.fail("rendered again"))
    assert main(["-c", str(built.parent.parent / "tiny.yaml")]) == 0
    assert "10 style samples in 3 shards" in capsys.readouterr().out


def test_an_interrupted_build_leaves_no_set_and_goes_on_where_it_was(built, tmp_path, monkeypatch):
    rendered, firsts = building._rendered, []

    def interrupted(description, first, last, device):
        firsts.append(first)
        for i, made in enumerate(rendered(description, first, last, device)):
            if len(firsts) == 2 and i == 2:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(building, "_rendered", interrupted)
    file = set_file(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build(file, workers=1)
    assert not (tmp_path / "shards" / "tiny").exists()
    folder = build(file, workers=1)
    assert firsts == [0, 4, 4, 8] and sums(folder) == sums(built)
    assert {f.name for f in folder.iterdir()} == {"000000.tar", "000001.tar", "000002.tar", "index.json"}
    assert not list(folder.parent.glob(".*.building"))


def test_a_killed_build_leaves_no_set_and_no_processes(tmp_path):
    file = set_file(tmp_path, count=4000, samples_per_shard=8, size=64)
    program = f"from lit_gen.data.build import build; build({str(file)!r}, workers=2)"
    # `-c` programs need no guard against being imported by spawned workers.
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("shards/.*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2 and list(tmp_path.glob("shards/.*/*.tar")) and not (tmp_path / "shards" / "tiny").exists()
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_a_changed_set_file_is_said_and_built_again(tmp_path, capsys):
    first = sums(build(set_file(tmp_path, count=2), workers=1))
    folder = build(set_file(tmp_path, count=2, seed=6), workers=1)
    assert "seed was 5, is 6; building" in capsys.readouterr().err
    assert sums(folder) != first and [f.name for f in folder.parent.iterdir() if f.is_dir()] == ["tiny"]


def test_a_set_with_a_missing_shard_is_built_again(tmp_path, capsys):
    folder = build(set_file(tmp_path, count=2), workers=1)
    first = sums(folder)
    (folder / "000000.tar").unlink()
    assert sums(build(set_file(tmp_path, count=2), workers=1)) == first
    assert "000000.tar is missing" in capsys.readouterr().err


def test_an_unknown_recipe_is_one_line(tmp_path, capsys):
    assert main(["-c", str(set_file(tmp_path, recipe="stiled")), "--workers", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "recipe must be one of base, " in error and "stiled" in error and "\n" not in error


def test_a_clip_of_a_phone_is_read_upright():
    """Cameras that are held upright store what they see lying on its side, and how it is to be turned."""
    lying = np.zeros((3, 32, 64, 3), np.uint8)
    lying[:, :, :32] = 255  # what is left of it becomes the top
    data = bytearray(encode_video(lying, ordinary=True))
    place = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    for video in (read_video(bytes(data)), read_frames(bytes(data), 3)):
        assert video.shape == (3, 64, 32, 3)
        assert video[:, :30].min() > 240 and video[:, 34:].max() < 15
