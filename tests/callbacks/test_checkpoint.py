"""Checkpoints on the disk: which are kept, which are whole, and what a full disk does."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy as toy_model

from lit_gen.callbacks import checkpoint
from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, checksums, is_whole, newest, step_of
from lit_gen.errors import UserError

Command = Callable[..., int]
SAVES = Path("runs/toy/one/checkpoints")
ONE = ("fit", "-c", "toy.yaml", "--stage", "one")


def names() -> list[str]:
    return sorted(path.name for path in SAVES.iterdir())


def test_the_newest_few_stay(lit_gen: Command, toy: Path) -> None:
    assert lit_gen(*ONE, "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "3") == 0
    kept = [f"step-{n:08d}.ckpt" for n in (6, 7, 8)]
    assert names() == sorted(["last.ckpt", *kept, *(f"{name}.sha256" for name in kept)])
    assert step_of(SAVES / "last.ckpt") == 8 and all(is_whole(SAVES / name) for name in kept)


def test_some_stay_for_good(lit_gen: Command, toy: Path) -> None:
    settings = {"every_n_steps": 1, "keep": 1, "keep_every_n_steps": 3}
    assert lit_gen(*ONE, *(f"--checkpoint.{key}={value}" for key, value in settings.items())) == 0
    assert [step_of(path) for path in sorted(SAVES.glob("step-*.ckpt"))] == [3, 6, 8]


def test_none_to_keep_is_refused(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen(*ONE, "--checkpoint.keep", "0") == 2
    assert "checkpoint.keep" in capsys.readouterr().err


def test_an_older_checkpoint_starts_a_new_course(lit_gen: Command, toy: Path) -> None:
    assert lit_gen(*ONE, "--checkpoint.keep", "9", "--trainer.max_steps", "6") == 0
    Path("runs/toy/one/DONE").unlink()
    older = str(SAVES / "step-00000002.ckpt")
    assert lit_gen(*ONE, "--checkpoint.keep", "9", "--trainer.max_steps", "7", "--ckpt_path", older) == 0
    # Steps 4 and 6 were made again on the way; nothing of the course before is left.
    assert [step_of(path) for path in sorted(SAVES.glob("step-*.ckpt"))] == [2, 4, 6, 7]
    assert Path("runs/toy/one/trace").read_text().split()[6:] == ["2:2", "3:3", "4:4", "5:5", "6:6"]
    steps = sorted(SAVES.glob("step-*.ckpt"))
    (SAVES / "last.ckpt").unlink()
    (SAVES / "last.ckpt").symlink_to(steps[1].name)
    assert newest(SAVES) == steps[1]  # what the link says, not the highest number


def test_the_same_command_starts_from_a_given_checkpoint_once(
    lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lit_gen(*ONE, "--trainer.max_steps", "6", "--experiment", "before") == 0
    given = "runs/before/one/checkpoints/last.ckpt"
    again = (*ONE, "--trainer.max_steps", "10", "--ckpt_path", given)

    def killed(at: int) -> None:
        class Killed(BaseException):
            pass

        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            if self.global_step == at:
                raise Killed
            return real(self, batch, batch_idx)

        real = toy_model.Regression.training_step
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(toy_model.Regression, "training_step", step)
            lit_gen(*again)

    killed(at=7)  # before it saved: there is nothing of its own to go on from
    killed(at=9)
    assert lit_gen(*again) == 0
    assert Path("runs/toy/one/trace").read_text().split() == ["6:6", "6:6", "7:7", "8:8", "8:8", "9:9"]
    # Wanted once more, and said so.
    Path("runs/toy/one/DONE").unlink()
    (SAVES / "started_from.json").unlink()
    assert lit_gen(*again) == 0
    assert Path("runs/toy/one/trace").read_text().split()[6:] == ["6:6", "7:7", "8:8", "9:9"]


def test_what_a_power_cut_emptied_is_taken_for_absent(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen(*ONE, "--trainer.max_steps", "4") == 0
    Path("runs/toy/one/DONE").unlink()
    emptied = [Path("runs/toy/one/metrics.json"), Path("runs/toy/one/fit.json"), *SAVES.glob("*.sha256")]
    for path in emptied:
        path.write_text("")
    capsys.readouterr()
    assert lit_gen(*ONE) == 0
    assert Path("runs/toy/one/trace").read_text().split()[4:] == ["4:4", "5:5", "6:6", "7:7"]
    error = capsys.readouterr().err
    assert all(f"warning: {path}: unreadable" in error for path in emptied[:2])


def test_when_all_are_damaged_nothing_is_started_over(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen(*ONE, "--trainer.max_steps", "4") == 0
    for path in SAVES.glob("step-*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = names()
    capsys.readouterr()
    assert lit_gen(*ONE) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step-00000004.ckpt" in error and "--fresh" in error and names() == before


def test_a_folder_is_whole_once_its_checksums_are_there(tmp_path: Path) -> None:
    path = tmp_path / "step-00000003.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    (path / "checkpoint" / "zero_pp_rank_0.pt").write_bytes(b"one shard")
    (path / "latest").write_text("checkpoint")
    assert not is_whole(path) and not is_whole(tmp_path / "none.ckpt")
    path.with_name(path.name + ".sha256").write_text(checksums(path, path.name))
    assert is_whole(path) and newest(tmp_path) == path
    (path / "checkpoint" / "zero_pp_rank_0.pt").write_bytes(b"one shart")
    assert not is_whole(path)
    (path / "checkpoint" / "zero_pp_rank_0.pt").unlink()
    assert not is_whole(path)


def test_one_flipped_bit_is_found_with_and_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(1000.0)}}, path)
    path.with_name(path.name + ".sha256").write_text(checksums(path, path.name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_whole(path)
    path.with_name(path.name + ".sha256").unlink()
    assert not is_whole(path)


@pytest.mark.parametrize("by", ["file object", "path"])
def test_a_full_disk_leaves_the_last_checkpoint(
    by: str, lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, []

    def save(content: object, file: object) -> None:
        calls.append(file)
        if len(calls) != 3:
            real(content, file)
        elif by == "path":  # as DeepSpeed writes
            real(content, "/dev/full")
        else:
            with open("/dev/full", "wb") as full:
                real(content, full)

    monkeypatch.setattr(torch, "save", save)
    assert lit_gen(*ONE) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step-00000006.ckpt" in error and "step-00000004.ckpt) is intact" in error
    assert by == "path" or "No space left on device" in error
    assert not list(SAVES.glob(".*")) and newest(SAVES) == SAVES / "step-00000004.ckpt"
    assert lit_gen(*ONE) == 0
    trace = Path("runs/toy/one/trace").read_text().split()
    assert trace[6:] == ["4:4", "5:5", "6:6", "7:7"]


def test_a_full_disk_while_publishing_leaves_the_last_checkpoint(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.write_whole

    def full(path: Path, text: str) -> None:
        if path.name == "step-00000004.ckpt.sha256":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, text)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    assert lit_gen(*ONE) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "write_whole", real)
    assert newest(SAVES) == SAVES / "step-00000002.ckpt"
    assert lit_gen(*ONE) == 0 and step_of(SAVES / "last.ckpt") == 8


def test_a_full_disk_elsewhere_is_one_line(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lit_gen.callbacks.record._write", full)
    assert lit_gen(*ONE) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.yaml: No space left on device" in error


def test_errors_of_other_kinds_are_not_called_a_full_disk(
    lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        lit_gen(*ONE)
    with pytest.raises(UserError, match="at least 1"):
        checkpoint.Checkpoint(every_n_steps=0)
