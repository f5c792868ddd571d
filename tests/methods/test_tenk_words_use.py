"""10k Words as it is used, on a tiny base: testing, features that are kept, the search of a folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_tenk_words import PLAIN, method

from lit_gen.data.decode import encode_video
from lit_gen.errors import UserError
from lit_gen.methods.tenk_words import TenKWords
from lit_gen.metrics.scores import read
from lit_gen.retrieval.towers import VideoTower

Command = Callable[..., int]
FILE = "experiments/tenk_words.yaml"


def test_several_processes_do_not_share_an_index(tiny_base: Path) -> None:
    model = method(tiny_base, folders=["."])
    model._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(UserError, match="one index, which 2 processes would overwrite.*--trainer.devices 1"):
        model.predict_dataloader()


@pytest.fixture(scope="module")
def trained(universe: Path) -> Path:
    """A working directory with a run of two steps."""
    from lit_gen import cli, interrupts, stage

    patch = pytest.MonkeyPatch()
    patch.setattr(cli, "launch", stage.main)
    patch.setattr(interrupts, "install", lambda: None)
    patch.setattr(interrupts, "leave_at_once", lambda: None)
    patch.chdir(universe)
    try:
        assert cli.main(["fit", "-c", FILE, "--smoke", "--trainer.accelerator", "cpu"]) == 0
        yield universe
    finally:
        patch.undo()


RUN = Path("runs/smoke/tenk_words")
WORDS = ("-c", FILE, "--smoke", "--trainer.accelerator", "cpu", "--trainer.limit_test_batches", "null")


def test_testing_scores_every_level_and_keeps_the_features(
    lit_gen: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    built = {path.name.partition(".")[0] for path in Path("data/shards").glob("stories*")}
    assert built == {"stories-val"} and list(Path("data/shards").glob("stories-val.cache-*"))
    assert lit_gen("test", *WORDS) == 0
    scores = read(RUN)
    assert len(scores["R@1 full"]) == len(scores["R@1 of ceiling mean of short"]) == 8
    assert {"R@1 mean of all unseen words", "R@1 expanded mean of all", "cut off full-university"} <= scores.keys()
    assert {"R@1 projected mean of short", "fitting first mean of short"} <= scores.keys()
    figures = json.loads((RUN / "metrics.json").read_text())["test"]
    assert figures["test/full/R@10"] == 1 and 0 < figures["test/full-short/ceiling"] <= 1
    levels = [v for k, v in figures.items() if k.endswith("/R@1") and "mean" not in k and "unseen" not in k]
    assert len(levels) == 14 and figures["test/mean of all/R@1"] == pytest.approx(sum(levels) / 14)
    before = (RUN / "scores.json").read_text()
    with monkeypatch.context() as kept:
        kept.setattr(TenKWords, "embed_videos", lambda *_: pytest.fail("a video was encoded again"))
        kept.setattr(TenKWords, "embed_texts", lambda *_: pytest.fail("a text was encoded again"))
        assert lit_gen("test", *WORDS) == 0
    assert (RUN / "scores.json").read_text() == before
    with monkeypatch.context() as changed:  # other frames are other features
        called = []
        original = TenKWords.embed_videos
        changed.setattr(TenKWords, "embed_videos", lambda *a: called.append(1) or original(*a))
        assert lit_gen("test", *WORDS, "--data.init_args.frames", "6") == 0
        assert called


def test_a_cache_that_the_run_itself_will_make_is_not_asked_for(
    lit_gen: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert lit_gen("check", *WORDS, "--data.init_args.cached", "float32") == 0


def test_cached_features_give_the_same_losses(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_gen.data.cache import cache
    from lit_gen.data.encoded import find
    from lit_gen.data.stories import Stories

    monkeypatch.chdir(trained)
    model = method(trained / "data/world-base", PLAIN, video_tower=VideoTower(cells=2, pooling="mean"))
    data = Stories("data/stories-val.yaml", batch_size=4, frames=5, cached="float32")
    plain = next(iter(data.train_dataloader()))
    cache(None, "", model, data, "float32", ["cpu"])
    data._caches = {"train": find(data, model, "float32")}
    cached = next(iter(data.train_dataloader()))
    assert "video" not in cached and cached["captions"] == plain["captions"] and cached["key"] == plain["key"]
    torch.testing.assert_close(model.embed_videos(cached), model.embed_videos(plain), rtol=1e-4, atol=1e-5)


def test_a_folder_is_indexed_once_and_searched_with_words(
    lit_gen: Command,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(trained)
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        pixels = np.full((7, 24, 32, 3), 60 * i, np.uint8)
        (folder / f"clip-{i}.mp4").write_bytes(encode_video(pixels))
    (folder / "broken.mp4").write_bytes(b"nothing")
    words = ("predict", *WORDS, "--trainer.limit_predict_batches", "null", "--folder", folder)
    asked = ("--prompt", "a red ball jumps", "--prompt", "night", "--model.init_args.top", "2")
    with caplog.at_level(logging.WARNING):
        assert lit_gen(*words, *asked) == 0
    assert "3 videos in the index" in (out := capsys.readouterr().out) and "1 cannot be read" in out
    assert "broken.mp4 left out" in caplog.text
    (folder / "clip-0.mp4").rename(tmp_path / "kept")
    (folder / "clip-0.mp4").write_bytes(b"broken since")
    assert lit_gen(*words, *asked) == 0
    assert "2 videos in the index" in (out := capsys.readouterr().out) and "2 cannot be read" in out
    (tmp_path / "kept").replace(folder / "clip-0.mp4")
    assert lit_gen(*words, *asked) == 0 and "3 videos in the index" in capsys.readouterr().out
    answers = (RUN / "samples/predict/answers.csv").read_text().splitlines()
    assert len(answers) == 5 and answers[1].startswith("a red ball jumps,1,") and "clip-" in answers[1]
    with Image.open(RUN / "samples/predict/answers.png") as sheet:
        assert sheet.width > 3 * 128
    (folder / "broken.mp4").unlink()
    counted = []
    original = TenKWords.embed_videos
    monkeypatch.setattr(TenKWords, "embed_videos", lambda *a: counted.append(1) or original(*a))
    assert lit_gen(*words, *asked) == 0 and not counted  # all of it is in the index
    assert (RUN / "samples/predict/answers.csv").read_text().splitlines() == answers
    os.utime(folder / "clip-1.mp4", (1, 1))
    shutil.copy(folder / "clip-2.mp4", folder / "clip-3.mp4")
    assert lit_gen(*words, *asked) == 0 and len(counted) == 2  # the one that changed, and the new one
    assert lit_gen(*words, *asked, "--model.init_args.frames", "2") == 0 and len(counted) == 6  # other features
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"nothing")
    assert lit_gen(*words[:-1], tmp_path / "bad", *asked) == 2
    assert "none of the 1 videos can be read" in capsys.readouterr().err
    assert lit_gen(*words, *asked, "--model.init_args.frames", "2") == 0 and len(counted) == 6  # which stays known
    capsys.readouterr()
    assert lit_gen(*words, "--prompt", " ") == 2 and "is empty" in capsys.readouterr().err
    assert lit_gen("predict", *WORDS, "--folder", "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert lit_gen("predict", *WORDS) == 2 and "--folder FOLDER" in capsys.readouterr().err
