"""`python -m lit_gen data`: build sets of the world, pack your own data, check shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_gen import interrupts
from lit_gen.data import story_commands
from lit_gen.data.shards import ShardSet
from lit_gen.data.split import Paused
from lit_gen.errors import UserError
from lit_gen.task import Task
from lit_gen.usage import TASK_HELP

_USAGE = """\
python -m lit_gen data -c data/x.yaml [-c …] [--task I/N] [--workers N] [--device cpu|cuda] [--force]
       python -m lit_gen data pack FOLDER --out data/shards/mine [--captions captions.csv] [--task I/N]
       python -m lit_gen data pack-stories ANNOTATIONS.json --videos FOLDER --out data/shards/mine [--captions FILE]
       python -m lit_gen data pack-stories SET --out data/shards/mine --store npy --frames 32 --size 224
       python -m lit_gen data describe ANNOTATIONS.json --model FOLDER --out captions.jsonl
       python -m lit_gen data verify SET"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code (2 for what the user can put right, said in one line)."""
    actions = {
        "pack": _pack,
        "pack-stories": story_commands.pack_stories,
        "describe": story_commands.describe,
        "verify": _verify,
    }
    try:
        if argv and argv[0] in actions:
            return actions[argv[0]](argv[1:])
        return _build(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Paused:
        print("data: paused; the same command continues it", file=sys.stderr)
        return interrupts.PAUSED


def _build(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(usage=_USAGE, description="Build the shards of set files.")
    parser.add_argument("-c", "--config", action="append", required=True, metavar="SET.yaml", help="a set file")
    parser.add_argument("--workers", type=int, help="processes that render (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to render (default: all GPUs, if any)")
    parser.add_argument("--force", action="store_true", help="build again even if nothing changed")
    parser.add_argument("--task", help=TASK_HELP, metavar="I/N")
    args = parser.parse_args(argv)
    from lit_gen.data.build import build

    for set_file in args.config:
        if folder := build(set_file, args.workers, args.force, args.device, Task.parse(args.task)):
            print(_summary(folder))
    return 0


def _pack(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lit_gen data pack", description="Pack a folder of pictures or videos with captions into shards."
    )
    parser.add_argument("folder", help="pictures or videos, each with its caption in a .txt beside it")
    parser.add_argument("--out", required=True, help="folder of the new set, e.g. data/shards/mine")
    parser.add_argument("--captions", help="csv with columns file and caption, instead of .txt files")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="SHARE", help="of files that may be unreadable"
    )
    parser.add_argument("--workers", type=int, help="processes that read and check files (default: all cores)")
    parser.add_argument("--task", help=TASK_HELP, metavar="I/N")
    args = parser.parse_args(argv)
    from lit_gen.data.pack import pack

    task = Task.parse(args.task)
    if out := pack(args.folder, args.out, args.captions, args.samples_per_shard, args.tolerance, args.workers, task):
        print(_summary(out))
    return 0


def _verify(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lit_gen data verify", description="Compare shards with the checksums of their index."
    )
    parser.add_argument("set", help="set file, folder, or pattern")
    shards = ShardSet.open(parser.parse_args(argv).set)
    problems = shards.verify()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        indexed = all(shard.sha256 for shard in shards.shards)
        whole = "all as the index says" if indexed else "all whole; there is no index with checksums to compare with"
        print(f"{shards.source}: {len(shards)} samples in {len(shards.shards)} shards, {whole}")
    return 2 if problems else 0


def _summary(folder: Path) -> str:
    shards = ShardSet.open(folder)
    megabytes = sum(s.bytes for s in shards.shards) / 1e6
    return f"{folder}: {len(shards)} {shards.kind} samples in {len(shards.shards)} shards, {megabytes:.1f} MB"
