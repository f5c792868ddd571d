"""Checkpoints that are whole or absent, and the one a run continues from.

`checkpoints/` of a run folder holds `step-NNNNNNNN.ckpt` (a file, or a folder where a strategy writes one), the
SHA-256 of its content beside it in the format of `sha256sum`, and `last.ckpt`, a link to the newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_gen.callbacks.record import Record
from lit_gen.errors import UserError, at_least
from lit_gen.files import read_json, write_whole
from lit_gen.weights import read_checkpoint

LAST = "last.ckpt"
UNFINISHED = ".*.unfinished"  # pattern of what a run that was killed while saving leaves behind


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes to the disk, then renames; loads tensors and plain values, never code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.unfinished")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        return read_checkpoint(path, map_location)


class Checkpoint(LightningCheckpoint):
    """Saves now and then and at every stop; the newest few stay, so that one survives whatever happens to another.

    Args:
        every_n_steps: optimizer steps between saves.
        keep: how many of the newest checkpoints to keep.
        keep_every_n_steps: keep those this many steps apart for good; 0 for none.
    """

    def __init__(self, every_n_steps: int = 200, keep: int = 2, keep_every_n_steps: int = 0) -> None:
        at_least(1, **{"checkpoint.every_n_steps": every_n_steps, "checkpoint.keep": keep})
        at_least(0, **{"checkpoint.keep_every_n_steps": keep_every_n_steps})
        self.every_n_steps, self.keep, self.keep_every_n_steps = every_n_steps, keep, keep_every_n_steps
        self.saved_step = -1
        self._written: tuple[Path, str] | None = None  # what waits to be published, and its checksums
        self._ranks_before: int | None = None  # of the run that is resumed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero and stage == "fit":
            for left_over in self.folder.glob(UNFINISHED):
                _remove(left_over)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["world_size"] = trainer.world_size

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ranks_before = checkpoint.get("world_size", trainer.world_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = trainer.global_step
        epochs = trainer.fit_loop.epoch_progress.total
        if epochs.processed == epochs.ready:  # saved at an epoch's end: Lightning would not begin the next
            trainer.fit_loop.reset_restart_stage()
        if self._ranks_before not in (None, trainer.world_size):
            _recount(trainer, self._ranks_before)
        # Saved before the validation of its step, which a kill or a pause kept from ending; Lightning would skip it.
        if self.saved_step and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            record = next((c for c in trainer.callbacks if isinstance(c, Record)), None)
            if record is not None and not record.validated(trainer):
                _validate(trainer)

    # Lightning calls checkpoint callbacks last, so the others' state (averages, counts, pauses) is that of this step.
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.saved_step:  # still accumulating gradients
            return
        kept = self.keep_every_n_steps > 0 and step % self.keep_every_n_steps == 0
        if step % self.every_n_steps == 0 or kept or trainer.should_stop or step == trainer.max_steps:
            self._write(trainer)

    # The figures of a step reach the event file only after `on_train_batch_end`. A checkpoint that others could see
    # before that would leave, after a kill between the two, a step without figures. So it is published here, at the
    # first hook that follows.
    def on_validation_start(self, *_: Any) -> None:
        self._publish()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._ranks_before not in (None, trainer.world_size):  # the step of figures was told by the batches before
            trainer.fit_loop.epoch_loop._batches_that_stepped, self._ranks_before = trainer.global_step, None
        self._publish()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._publish()

    def on_exception(self, *_: Any) -> None:
        self._publish()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:  # max_epochs reached
            self._write(trainer)
        self._publish()

    def _write(self, trainer: L.Trainer) -> None:
        """Save under a name that nobody takes for a checkpoint; every rank must call this."""
        self.saved_step = trainer.global_step
        path = self.folder / f"step-{self.saved_step:08d}.ckpt"
        hidden = path.with_name(f".{path.name}.unfinished")
        try:
            trainer.save_checkpoint(hidden)
            if trainer.is_global_zero:
                self._written = path, checksums(hidden, path.name)
        except (OSError, RuntimeError) as error:  # torch tells only so when it writes the file itself
            if not isinstance(error, OSError) and "inline_container" not in str(error):
                raise
            _remove(hidden)
            raise UserError(self._why_not(path, error)) from error

    def _why_not(self, path: Path, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "writing failed"
        free = shutil.disk_usage(self.folder).free / 1e6
        last = self.folder / LAST
        intact = f"{last} ({last.resolve().name}) is intact" if last.exists() else "there is no earlier one"
        return (
            f"{path}: the checkpoint cannot be written: {reason} ({free:,.0f} MB are free); "
            f"{intact}; make room and give the same command again"
        )

    def _publish(self) -> None:
        if self._written is None:
            return
        (path, listed), self._written = self._written, None
        link = path.with_name(f".{LAST}.unfinished")
        try:
            write_whole(_manifest(path), listed)
            if path.is_dir():  # made again after an earlier one was passed over
                _remove(path)
            path.with_name(f".{path.name}.unfinished").replace(path)
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(path.with_name(LAST))
            _flush(self.folder)
        except OSError as error:
            raise UserError(self._why_not(path, error)) from error
        self._prune(path)

    def _prune(self, current: Path) -> None:
        """Remove what is older than the newest few, and what an earlier course of this run had ahead of it."""
        steps, now = _numbered(self.folder), step_of(current)
        newest_ones = sorted(step for step in steps if step <= now)[-self.keep :]
        for step, path in steps.items():
            if step not in newest_ones and not (self.keep_every_n_steps and step % self.keep_every_n_steps == 0):
                _remove(path)
        for manifest in self.folder.glob("step-*.sha256"):
            if not manifest.with_suffix("").exists():
                manifest.unlink(missing_ok=True)


def continued(folder: Path, given: str | None) -> Path | str | None:
    """The checkpoint a run goes on from: its newest, or a `given` one, from which the same command starts only once.

    A requeued command is the same words again. So it is kept beside the checkpoints what a run was started from, and
    what `last.ckpt` was then: once that is another, the course from the given one has checkpoints of its own.
    """
    if given is None:
        return newest(folder)
    kept, link = folder / "started_from.json", folder / LAST
    last = link.lstat().st_mtime_ns if link.is_symlink() else None
    now = {"path": os.path.abspath(given), "changed": os.stat(given).st_mtime_ns if os.path.exists(given) else None}
    before = read_json(kept) or {}
    # A given one of the run's own may be pruned on the way.
    same = now["path"] == before.get("path") and now["changed"] in (None, before.get("changed"))
    if same and last not in (None, before.get("last")) and (found := newest(folder)):
        _say(f"continuing from {found}, as {given} was started from already; to start from it again, remove {kept}")
        return found
    if not rank_zero_only.rank:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(now | {"last": last}))
    return whole(given)


def newest(folder: Path) -> Path | None:
    """The checkpoint a run continues from: the last whole one of its `checkpoints/` folder.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    found, last = _numbered(folder), step_of(folder / LAST)
    damaged = []
    # Steps after the last one belong to a course that was given up.
    for _, path in sorted(found.items(), key=lambda item: (last is None or item[0] <= last, item[0]), reverse=True):
        if is_whole(path):
            if damaged:
                _say(f"warning: {', '.join(damaged)}: damaged (not what was written); continuing from {path} instead")
            return path
        damaged.append(str(path))
    if damaged:
        raise UserError(f"{', '.join(damaged)}: damaged, and there is no other checkpoint; --fresh starts over")
    return None


def whole(path: str | Path) -> Path:
    """The checkpoint to take weights from: `path`, or, if that is a run's last one, its last whole one.

    Raises:
        UserError: it is damaged.
    """
    path = Path(path)
    if path.name == LAST and (found := newest(path.parent)) is not None:
        return found
    if _manifest(path.resolve()).is_file() and not is_whole(path):
        raise UserError(f"{path}: damaged (not what was written); take another checkpoint")
    return path


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what was written, by the checksums beside it.

    A file without them is held against those that its zip archive has of its own; a folder without them is one that
    was never finished.
    """
    path = path.resolve()  # `last.ckpt` is a link
    try:
        # An empty list is what a power cut leaves of one: it says nothing about the checkpoint.
        if listed := _manifest(path).read_text() if _manifest(path).is_file() else "":
            return checksums(path, path.name) == listed
        if path.is_dir():
            return False
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # what is damaged raises nearly anything: UnicodeDecodeError, zlib.error, EOFError…
        return False


def checksums(path: Path, name: str) -> str:
    """SHA-256 of a file, or of every file in a folder, in the format of `sha256sum`, as if it were called `name`."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_sha256, files))
    names = [str(Path(name) / file.relative_to(path)) for file in files]
    return "".join(f"{digest}  {file}\n" for digest, file in zip(digests, names, strict=True))


def step_of(path: Path) -> int | None:
    """Optimizer step of a checkpoint of a run, from its name (of what it links to); None for any other file."""
    found = re.fullmatch(r"step-(\d+)\.ckpt", path.resolve().name)
    return int(found[1]) if found else None


def _numbered(folder: Path) -> dict[int, Path]:
    return {step: path for path in folder.glob("step-*.ckpt") if (step := step_of(path)) is not None}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _recount(trainer: L.Trainer, before: int) -> None:
    """Turn the batches of this epoch that `before` processes have made into those that the present ones would have."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current = progress.current
    batches, steps_of = trainer.num_training_batches, trainer.accumulate_grad_batches
    # At least a batch is left of an epoch that is not over, and a step begins with the first of its batches.
    ready = int(min(current.ready * before // trainer.world_size, batches - 1)) // steps_of * steps_of
    ready = batches if progress.is_last_batch else ready
    current.completed += ready - current.ready
    current.ready = current.started = current.processed = ready


def _validate(trainer: L.Trainer) -> None:
    """What Lightning does at the end of a step."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    counted = loop.batch_progress.state_dict()
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training = True
    loop.batch_progress.load_state_dict(counted)  # Lightning will count the validation that it thinks has been


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Have the disk remember the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
