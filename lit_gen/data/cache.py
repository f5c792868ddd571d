"""`python -m lit_gen cache -c ...`: encode the training sets of an experiment once, instead of in every step."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from lit_gen import cli, interrupts
from lit_gen.data.decode import decode
from lit_gen.data.encoded import KIND, MEMBER, description, folder_of, key_of
from lit_gen.data.loader import collate
from lit_gen.data.module import Precision, Shards
from lit_gen.data.shards import INDEX, BadSample, Shard, ShardSet
from lit_gen.data.split import Job, Paused, Samples, cores, own_devices
from lit_gen.data.write import write_index
from lit_gen.errors import ShardError, UserError
from lit_gen.methods.base import Method
from lit_gen.run import Run
from lit_gen.stage import Command
from lit_gen.task import Task

logger = logging.getLogger(__name__)

_OPTIONS = ("dtype", "batch_size", "device", "workers", "task")


class _Instances(Command):
    """The model and the data of a run, without a trainer."""

    def __init__(self, run: Run) -> None:
        super().__init__("fit", [run], [])

    def _set_seed(self) -> None:
        pass

    def instantiate_trainer(self, **_: Any) -> None:  # type: ignore[override]
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit status (75 when a signal stopped it: the same command continues)."""
    files, options, overrides = cli.parse(argv)
    given = {key: value for key, value in overrides if key in _OPTIONS}
    if not files:
        raise UserError("cache needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    task = Task.parse(given.get("task"))
    workers, batch_size = (_number(key, given[key]) if key in given else None for key in ("workers", "batch_size"))
    dtype = given.get("dtype", "float16")
    if dtype not in ("float16", "float32"):
        raise UserError(f"--dtype must be float16 or float32, not {dtype}")
    devices = own_devices(given.get("device"), workers or 1)
    runs = cli.chosen(files, options, [(k, v) for k, v in overrides if k not in _OPTIONS])
    count = 0
    try:
        for run in runs:
            method, data = instances(run)
            found = training_sets(data)
            for key, module in found:
                where = f"--stages.{run.folder.name}.{key}" if "/" in run.name else f"--{key}"
                folder = cache(run, key, method, module, dtype, devices, task, batch_size)
                if folder is not None:
                    print(_summary(folder, "" if module.cached else f"{where}.cached {dtype}"))
            count += len(found)
    except Paused:
        print("cache: paused; the same command continues it", file=sys.stderr)
        return interrupts.PAUSED
    if not count:
        raise UserError(f"{', '.join(files)}: its stages train on no sets of shards, so there is nothing to cache")
    return 0


def instances(run: Run) -> tuple[L.LightningModule, L.LightningDataModule | None]:
    """Model and data of a run."""
    from lit_gen.stage import as_user_error

    try:
        made = _Instances(run)
    except Exception as error:
        raise as_user_error(error, run) from error
    return made.model, made.datamodule


def training_sets(data: L.LightningDataModule | None, key: str = "data.init_args") -> list[tuple[str, Shards]]:
    """The data modules that read a training set, with the keys of their settings; a mixture has several."""
    if isinstance(data, Shards):
        return [(key, data)] if data.sources["train"] else []
    parts = vars(data).items() if data is not None else ()
    found = (training_sets(v, f"{key}.{k}.init_args") for k, v in parts if isinstance(v, L.LightningDataModule))
    return list(itertools.chain.from_iterable(found))


def cache(
    run: Run,
    key: str,
    method: L.LightningModule,
    module: Shards,
    dtype: Precision = "float16",
    devices: list[str] | None = None,
    task: Task = Task(),
    batch_size: int | None = None,
) -> Path | None:
    """Encode the training set of one data module, unless that is done; several processes share the work by shard.

    Args:
        run: that `method` and `module` are of, from which other processes make their own.
        key: of the module in its settings.
        dtype: precision to store, where the module's `cached` says nothing.
        devices: one process each, the CPU by default.
        batch_size: samples encoded at a time, the module's by default.

    Returns:
        The folder of the cache, or None while other tasks have yet to write their part.

    Raises:
        UserError: the method has nothing to cache, or the set is not there.
        Paused: a signal asked to stop.
    """
    source = str(module.sources["train"])
    if Path(source).suffix in (".yaml", ".yml"):
        from lit_gen.data.build import build

        build(source)
    shards = ShardSet.open(source)
    described = description(module, method, shards, module.cached or dtype)
    folder = folder_of(module, described)
    devices, size = devices or ["cpu"], batch_size or module.batch_size

    def start(_: Path, device: str) -> Samples:
        return Encoder(method, module, shards, size, described["dtype"], device, cores())

    def index(building: Path, written: list[Shard]) -> None:
        write_index(building, KIND, written, described, key_of(described))

    job = Job(
        folder=folder,
        key=key_of(described)[:12],
        title=f"encoding {folder.name}",
        sizes=[shard.samples for shard in shards.shards],
        # other processes cannot be sent a model on a device; one process has it already
        start=partial(_encoder, run, key, size, described["dtype"], len(devices)) if len(devices) > 1 else start,
        finish=index,
    )
    return folder if job.run(task, devices, (folder / INDEX).is_file) else None


def _encoder(run: Run, key: str, batch_size: int, dtype: str, processes: int, _: Path, device: str) -> Samples:
    """What writes shards in a process of its own."""
    method, data = instances(run)
    module = dict(training_sets(data))[key]
    shards = ShardSet.open(module.sources["train"])
    return Encoder(method, module, shards, batch_size, dtype, device, max(1, cores() // processes))


class Encoder:
    """Number of a shard -> its samples, encoded; those that cannot be read say why.

    Reading and decoding run ahead in threads, and the device computes a batch while the one before is written.

    Args:
        method: whose `encode_for_cache` runs.
        module: whose preprocessing the samples get.
        shards: to be encoded.
        batch_size: samples encoded at a time.
        dtype: precision of the floating-point results.
        device: where the method's encoders are moved to.
        threads: that decode.
    """

    def __init__(
        self,
        method: Method,
        module: Shards,
        shards: ShardSet,
        batch_size: int,
        dtype: Precision,
        device: str,
        threads: int,
    ) -> None:
        self.method, self.shards, self.batch_size, self.threads = method, shards, batch_size, threads
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self.tolerance, self.bad = module.tolerance, 0
        self.transform, self.extensions = module.whole(shards), module.extensions
        self._reading = threading.Lock()  # sets are read by one thread at a time
        for part in method.cached_parts().values():
            if isinstance(part, nn.Module):
                part.to(self.device)

    def __call__(self, number: int) -> Iterator[dict[str, str | bytes]]:
        first = sum(shard.samples for shard in self.shards.shards[:number])
        rows = range(first, first + self.shards.shards[number].samples)
        waiting: tuple[list[tuple[str, Any]], dict[str, Tensor]] | None = None
        with ThreadPoolExecutor(self.threads) as pool:
            for samples in self._batches(_ahead(pool, self._load, rows, 3 * self.batch_size)):
                readable = [sample for _, sample in samples if not isinstance(sample, str)]
                encoded = self._encode(collate(readable)) if readable else {}
                if waiting is not None:
                    yield from self._members(*waiting)
                waiting = samples, encoded
        if waiting is not None:
            yield from self._members(*waiting)

    def _load(self, index: int) -> tuple[str, dict[str, Any] | str]:
        """Key and content of a sample, or why it cannot be read."""
        key = f"sample-{index}"
        try:
            with self._reading:
                name, members = self.shards.read(index, self.extensions)
            key = name.partition("/")[2]
            decoded = {extension: decode(extension, data) for extension, data in members.items()}
            return key, self.transform(decoded | {"key": key}, np.random.default_rng(0))
        except BadSample as error:
            return key, str(error)

    def _batches(self, samples: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
        """Neighbours that can be one batch: clips may be of different lengths."""

        def shapes(sample: tuple[str, Any]) -> Any:
            content = sample[1]
            return isinstance(content, dict) and [v.shape for v in content.values() if isinstance(v, Tensor)]

        for _, group in itertools.groupby(samples, shapes):
            while batch := list(itertools.islice(group, self.batch_size)):
                yield batch

    @torch.inference_mode()
    def _encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        on_device = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        encoded = self.method.encode_for_cache(on_device)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in encoded.items()}

    def _members(self, samples: list[tuple[str, Any]], encoded: dict[str, Tensor]) -> Iterator[dict[str, str | bytes]]:
        arrays = {name: value.cpu().contiguous().numpy() for name, value in encoded.items()}
        for name, value in arrays.items():
            if not np.isfinite(value).all():
                raise UserError(f"{name} has values beyond the range of {value.dtype}; use --dtype float32")
        row = 0
        for key, content in samples:
            if isinstance(content, str):
                self._count_bad(key, content)
                yield {"__key__": key, "txt": content.encode()}
            else:
                yield {"__key__": key, MEMBER: save({n: np.ascontiguousarray(v[row]) for n, v in arrays.items()})}
                row += 1

    def _count_bad(self, key: str, reason: str) -> None:
        self.bad += 1
        logger.warning(
            "data: %s of %s cannot be encoded (%s); training will replace it", key, self.shards.source, reason
        )
        if self.bad > self.tolerance * len(self.shards):
            raise ShardError(
                f"{self.shards.source}: {self.bad} of {len(self.shards)} samples cannot be encoded (more than "
                f"{self.tolerance:.1%}), the last is {key}: {reason}"
            )


def _ahead(pool: ThreadPoolExecutor, function: Any, items: Iterable[Any], count: int) -> Iterator[Any]:
    """function(item) in order, `count` of them in the making."""
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _number(key: str, text: str | None) -> int:
    if not (text or "").isdigit() or int(text or 0) < 1:
        raise UserError(f"--{key} must be a positive whole number, not {text}")
    return int(text or 0)


def _summary(folder: Path, switch: str) -> str:
    shards = ShardSet.open(folder)
    megabytes = sum(s.bytes for s in shards.shards) / 1e6
    hint = f"; train from it with {switch}" if switch else ""
    return f"{folder}: {len(shards)} samples in {len(shards.shards)} shards, {megabytes:.1f} MB{hint}"
