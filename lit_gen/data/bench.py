"""How fast a set is read: `python -m lit_gen bench data -c SET`."""

from __future__ import annotations

import argparse
import sys
import time

from lit_gen.data import images, videos
from lit_gen.data.images import ImageSample
from lit_gen.data.loader import ShardLoader
from lit_gen.data.shards import ShardSet
from lit_gen.data.styled import StyleSample
from lit_gen.data.videos import VideoSample
from lit_gen.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Print, per number of workers, samples and megabytes read and decoded per second; nothing is trained."""
    parser = argparse.ArgumentParser(prog="python -m lit_gen bench data", description="Measure how fast a set is read.")
    parser.add_argument("-c", "--config", required=True, metavar="SET", help="set file, folder, pattern, URL or pipe")
    parser.add_argument("--workers", default="0,1,2", metavar="N,N,…", help="processes that decode, 0 for none")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--size", type=int, help="pixels of the crops (default: as stored; 64 for style pairs)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each number of workers")
    parser.add_argument("--warmup", type=float, default=1.0, metavar="SECONDS", help="not measured before that")
    options = parser.parse_args(argv)
    try:
        workers = [int(word) for word in options.workers.split(",")]
    except ValueError:
        parser.error(f"--workers is a list of numbers, e.g. 0,1,2, not {options.workers}")
    try:
        shards = ShardSet.open(options.config)
        sample, extensions = _reader(shards, options.size)
        stored = sum(shard.bytes for shard in shards.shards) / len(shards)
        print(
            f"{shards.source}: {len(shards)} samples of {stored / 1e3:.1f} kB in {len(shards.shards)} shards, ", end=""
        )
        print(f"batches of {options.batch_size}")
        print(f"{'workers':>8}{'samples/s':>12}{'per worker':>12}{'MB/s':>8}{'unreadable':>12}", flush=True)
        for count in workers:
            loader = ShardLoader(shards, sample, extensions, options.batch_size, workers=count, tolerance=1.0)
            rate = _rate(loader, options.warmup, options.seconds)
            row = (
                f"{count:>8}{rate:>12.1f}{rate / max(count, 1):>12.1f}{rate * stored / 1e6:>8.1f}{len(loader.bad):>12}"
            )
            print(row, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _reader(shards: ShardSet, size: int | None) -> tuple[ImageSample | VideoSample | StyleSample, set[str]]:
    """What the data module for this kind of set makes of a sample, and the members it reads."""
    if shards.kind == "videos":
        return VideoSample(size), videos.EXTENSIONS
    if shards.kind == "style":
        return StyleSample(size or 64), images.EXTENSIONS
    return ImageSample(size), images.EXTENSIONS


def _rate(loader: ShardLoader, warmup: float, seconds: float) -> float:
    """Samples per second; what workers had read ahead when the clock started is not counted as read in no time."""
    begun, counted = time.perf_counter(), 0
    started = None
    while True:
        for batch in loader:
            now = time.perf_counter()
            if started is not None:
                counted += len(batch["key"])
                if now - started >= seconds:
                    return counted / (now - started)
            elif now - begun >= warmup:
                started = now
