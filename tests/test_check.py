"""`check`: finds what `fit` would stumble over, all of it at once, and starts nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_gen.data import encoded
from lit_gen.data.build import build
from lit_gen.data.decode import encode_video
from lit_gen.data.module import StyledImages
from lit_gen.data.shards import ShardSet
from lit_gen.data.write import write_index, write_tar

Command = Callable[..., int]

STYLED = """\
trainer: {{accelerator: cpu, max_steps: 5, val_check_interval: {interval}{trainer}}}
model:
  class_path: toy.{model}
  init_args: {{reads: {reads}}}
data:
  class_path: lit_gen.data.module.StyledImages
  init_args: {{train: {train}, val: sets/small.yaml, batch_size: {batch_size}}}
checkpoint: {{every_n_steps: 2}}
stages:
  one: {{}}
  two:
    init_from: {init_from}
"""
GOOD = {
    "interval": "3",
    "trainer": "",
    "model": "Regression",
    "reads": "sets/small.yaml",
    "train": "sets/small.yaml",
    "batch_size": "4",
    "init_from": "runs/a/one/checkpoints/last.ckpt",
}
ZERO = ", strategy: {class_path: lit_gen.scale.zero.ZeRO, init_args: {stage: %s}}"


@pytest.fixture
def sets(here: Path) -> Path:
    (here / "sets").mkdir()
    (here / "sets" / "small.yaml").write_text("kind: style\nrecipe: styled\nsplit: train\ncount: 16\n")
    (here / "sets" / "clips.yaml").write_text("kind: videos\nrecipe: motion\nsplit: train\ncount: 16\n")
    return here / "a.yaml"


def test_nothing_wrong(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write_text(STYLED.format(**GOOD))
    assert lit_gen("check", "-c", "a.yaml") == 0
    out = capsys.readouterr().out
    assert "a/one: Regression, 0.0 M of 0.0 M parameters are trained, not started" in out
    assert "sets/small.yaml (16 samples, to be built), 4 steps of 4 an epoch, 1.25 epochs in 5 steps" in out
    assert "0 problems" in out and "note:" not in out
    assert not Path("runs").exists() and not Path("sets/shards").exists()


# what is changed, (the line, what is said there)
PROBLEMS: list[tuple[dict[str, str], int, str]] = [
    ({"train": "sets/smal.yaml"}, 7, "sets/small.yaml"),
    ({"train": "sets/clips.yaml"}, 7, "videos"),
    ({"train": "'sets/{0..3}.tar'"}, 7, "sets/0.tar"),
    ({"batch_size": "17"}, 7, "fewer than one step of 17"),
    ({"batch_size": "5", "trainer": ", devices: 2, accumulate_grad_batches: 2"}, 7, "fewer than one step of 20"),
    ({"interval": "5"}, 1, "check_val_every_n_epoch"),
    ({"train": "'s3://b/{{0..3}}.tar'"}, 7, "s3:// is not read directly"),
    ({"init_from": "last.ckpt"}, 12, "names last.ckpt"),
    ({"reads": "sets/none.txt"}, 4, "no `none.txt` in sets"),
    ({"init_from": "sets/last.ckpt"}, 12, "sets/last.ckpt"),
    ({"trainer": ", max_time: soon"}, 1, "HH:MM:SS"),
    ({"trainer": ZERO % 2}, 1, "ZeRO needs NVIDIA GPUs"),
    ({"trainer": ZERO % "2, offload: all"}, 1, "offload: all needs stage: 3"),
    ({"trainer": ZERO % 2, "model": "Adversarial"}, 1, "2 optimizers"),
    (
        {"trainer": ", accumulate_grad_batches: 2", "model": "Adversarial"},
        1,
        "rules out trainer.accumulate_grad_batches",
    ),
    ({"trainer": ", gradient_clip_val: 1.0", "model": "Plain", "reads": "null"}, 1, "optimizer.clip_norm"),
]


@pytest.mark.parametrize(("change", "line", "said"), PROBLEMS, ids=lambda value: str(value)[:50])
def test_a_problem_is_named_with_its_line(
    change: dict[str, str], line: int, said: str, sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    sets.write_text(STYLED.format(**GOOD | change))
    assert lit_gen("check", "-c", "a.yaml") == 2
    captured = capsys.readouterr()
    lines = [text for text in captured.err.splitlines() if said in text]
    assert lines and f"a.yaml:{line}: " in lines[0], captured.err
    assert len(set(lines)) == 1, captured.err  # once, though both stages have it


@pytest.mark.parametrize(
    ("strategy", "copies"),
    [("lightning.pytorch.strategies.DDPStrategy", True), ("lit_gen.scale.ddp.DDP", False)],
)
def test_a_second_copy_of_gradients_is_counted(
    strategy: str, copies: bool, sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f", devices: 2, strategy: {{class_path: {strategy}}}"
    sets.write_text(STYLED.format(**GOOD | {"trainer": more, "interval": "2"}))
    assert lit_gen("check", "-c", "a.yaml") == 0
    assert ("buckets of DDP" in capsys.readouterr().out) == copies


def test_problems_of_every_kind_come_together(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"train": "sets/smal.yaml", "interval": "soon", "init_from": "sets/last.ckpt"}
    sets.write_text(
        STYLED.format(**GOOD | wrong) + "    trainer: {max_stps: 3}\n  three: {model: {init_args: {widht: 3}}}\n"
    )
    assert lit_gen("check", "-c", "a.yaml", "--trainer.max_epoch", "3") == 2
    captured = capsys.readouterr()
    expected = {
        "a.yaml:1: ": "`soon` is not a time",
        "a.yaml:7: ": "sets/small.yaml",
        "a.yaml:12: ": "sets/last.ckpt",
        "a.yaml:13: ": "`max_steps`",
        "a.yaml:14: ": "`width`",
        "--trainer.max_epoch: ": "`max_epochs`",
    }
    lines = captured.err.splitlines()
    for where, said in expected.items():
        assert sum(f"error: {where}" in line and said in line for line in lines) == 1, captured.err
    assert f"{len(expected)} problems" in captured.out and len(lines) == len(expected)


def test_one_sample_of_each_set_is_opened(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build("sets/small.yaml")
    sets.write_text(STYLED.format(**GOOD | {"train": str(folder)}))
    assert lit_gen("check", "-c", "a.yaml") == 0
    capsys.readouterr()

    good = {"__key__": "a", "png": (folder / "none").name.encode(), "txt": b"a"}  # no picture
    shard = write_tar(folder / "000000.tar", [good] * 16)
    write_index(folder, "style", [shard], json.loads((folder / "index.json").read_text())["description"])
    assert lit_gen("check", "-c", "a.yaml") == 2
    err = capsys.readouterr().err
    assert f"a.yaml:7: {folder}: 000000.tar/a cannot be read: .png of 4 bytes" in err

    (folder / "000000.tar").unlink()
    assert lit_gen("check", "-c", "a.yaml") == 2
    assert f"a.yaml:7: {folder}: shard" in capsys.readouterr().err


def test_samples_that_do_not_go_into_one_batch_are_told(
    sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def clip(frames: int) -> dict[str, str | bytes]:
        pixels = np.zeros((frames, 16, 16, 3), np.uint8)
        return {"__key__": f"clip{frames}", "mp4": encode_video(pixels), "txt": b"a"}

    (sets.parent / "own").mkdir()
    write_index(Path("own"), "videos", [write_tar(Path("own/000000.tar"), [clip(3)] * 15 + [clip(5)])], {})
    for batch_size, code in ((4, 2), (1, 0)):
        text = STYLED.format(**GOOD | {"train": "own", "batch_size": batch_size})
        sets.write_text(text.replace("StyledImages", "Videos").replace(" val: sets/small.yaml,", ""))
        assert lit_gen("check", "-c", "a.yaml") == code
    assert "a.yaml:7: samples differ in the shape of video" in capsys.readouterr().err


def test_a_set_that_is_yet_to_be_built_is_tried_too(
    sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STYLED.format(**GOOD | {"train": "sets/clips.yaml", "batch_size": "4, frames: 99"})
    sets.write_text(text.replace("StyledImages", "Videos").replace(" val: sets/small.yaml,", ""))
    assert lit_gen("check", "-c", "a.yaml") == 2
    err = capsys.readouterr().err
    assert "a.yaml:7: sets/clips.yaml: 000000.tar/00000000 cannot be read: the video has 8 frames, 99 are needed" in err
    assert not Path("sets/shards").exists()


def test_a_set_whose_file_has_changed_is_judged_by_the_file(
    sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    build("sets/small.yaml")
    Path("sets/small.yaml").write_text("kind: style\nrecipe: styled\nsplit: train\ncount: 40\n")
    sets.write_text(STYLED.format(**GOOD | {"batch_size": "20", "interval": "2"}))
    assert lit_gen("check", "-c", "a.yaml") == 0
    assert "sets/small.yaml (40 samples, to be built)" in capsys.readouterr().out


def test_faults_of_a_sample_or_a_step_are_told(
    sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IndexError("tuple index\nout of range")

    sets.write_text(STYLED.format(**GOOD))
    with monkeypatch.context() as patch:
        patch.setattr("lit_gen.check.training.activations", fail)
        assert lit_gen("check", "-c", "a.yaml") == 0
    told = capsys.readouterr().out
    assert "a training step on shapes alone fails (IndexError: tuple index out of range)" in told
    monkeypatch.setattr("lit_gen.check.data.first_sample", fail)
    assert lit_gen("check", "-c", "a.yaml") == 2
    said = "a.yaml:7: sets/small.yaml: its first sample cannot be made: IndexError: tuple index out of range"
    assert said in capsys.readouterr().err


def test_a_cache_must_be_there_and_fit(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write_text(STYLED.format(**GOOD | {"batch_size": "4, cached: float16"}))
    for make in (lambda: None, lambda: build("sets/small.yaml")):
        make()
        assert lit_gen("check", "-c", "a.yaml") == 2
        assert "a.yaml:7: sets/small.yaml is not cached yet; run python -m lit_gen cache" in capsys.readouterr().err

    module = StyledImages(train="sets/small.yaml", cached="float16")
    preprocessing = {"version": encoded.VERSION, **module.preprocessing()}
    made_from = {"method": "m", "weights": {}, "preprocessing": preprocessing, "dtype": "float16"}
    made_from["set"] = ShardSet.open("sets/small.yaml").fingerprint
    cache = encoded.folder_of(module, made_from)
    cache.mkdir()
    (cache / "index.json").write_text(json.dumps({"description": made_from}))
    assert lit_gen("check", "-c", "a.yaml") == 0
    (cache / "index.json").write_text(json.dumps({"description": made_from | {"dtype": "float32"}}))
    assert lit_gen("check", "-c", "a.yaml") == 2
    assert "only from something else (dtype: float32 -> float16)" in capsys.readouterr().err


def test_a_command_is_not_run(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write_text(STYLED.format(**GOOD | {"train": "'pipe:touch canary; cat x.tar'"}))
    assert lit_gen("check", "-c", "a.yaml") == 0
    assert "note: a.yaml:7: pipe:touch canary; cat x.tar is fetched" in capsys.readouterr().out
    assert not Path("canary").exists()


def test_what_may_be_meant_is_noted(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.accelerator=gpu", "--trainer.devices=auto", "--checkpoint.every_n_steps=100"]
    sets.write_text(STYLED.format(**GOOD))
    assert lit_gen("check", "-c", "a.yaml", *words) == 0
    out = capsys.readouterr().out
    for word, said in zip(words, ("this machine has none", "of one device", "from the beginning"), strict=True):
        assert any(line.startswith(f"note: {word.split('=')[0]}: ") and said in line for line in out.splitlines()), out


def test_checkpoints_must_fit_on_the_disk(
    sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    sets.write_text(STYLED.format(**GOOD))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 950, 143))
    assert lit_gen("check", "-c", "a.yaml") == 2  # two stages of three checkpoints of six numbers of four bytes
    err = capsys.readouterr().err
    assert "a.yaml:8: the checkpoints of all stages take 144 B, but only 143 B are free" in err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 950, 144))
    assert lit_gen("check", "-c", "a.yaml") == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no .safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x00" * 100, "damaged"),
    ],
)
def test_weights_that_are_not_there(
    content: bytes | None, said: str, universe: Path, here: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(universe, here, dirs_exist_ok=True)
    (weights,) = Path("data/world-base/unet").glob("*.safetensors")
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    assert lit_gen("check", "-c", "experiments/stylecrafter.yaml", "--stage", "adapter", "--smoke") == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if said in line)
    assert line.startswith("error: experiments/stylecrafter.yaml:") and "unet" in line


def test_a_model_that_is_not_here_yet(
    universe: Path, here: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(universe, here, dirs_exist_ok=True)
    words = ["--stage", "adapter", "--smoke", "--model.base", "nobody/nothing"]
    assert lit_gen("check", "-c", "experiments/stylecrafter.yaml", *words) == 0
    assert "note: --model.base: " in (out := capsys.readouterr().out) and "hf download nobody/nothing" in out
