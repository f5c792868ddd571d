"""`python -m lit_gen data pack-stories` and `data describe`: annotated long videos, and captions written for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from lit_gen.data.shards import ShardSet
from lit_gen.errors import UserError
from lit_gen.task import Task


def pack_stories(argv: list[str]) -> int:
    from lit_gen.data import annotations
    from lit_gen.data.storage import Store, store_again

    parser = argparse.ArgumentParser(
        prog="python -m lit_gen data pack-stories",
        description="Pack annotated long videos into shards of stories, or store those of a set in another way.",
    )
    parser.add_argument("annotations", help="JSON with the sentences of each video's segments, or a set of stories")
    parser.add_argument("--videos", metavar="FOLDER", help="videos, or folders of their frames; a set has its own")
    parser.add_argument("--out", required=True, help="folder of the new set, e.g. data/shards/activitynet")
    parser.add_argument("--captions", action="append", metavar="FILE", help="JSON lines of synthetic captions")
    parser.add_argument("--frames", type=int, default=64, metavar="N", help="kept of each video; 0 keeps all")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="short side of the frames; 0 for all")
    parser.add_argument(
        "--store",
        choices=get_args(Store),
        default="mp4",
        help="npy: frames that are read without decoding, cropped to the square in the middle (default: mp4)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=100, metavar="N", help="where annotations are packed")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="SHARE", help="of videos that may be missing or unreadable"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--task", help="part of the shards to write, 0/N to N-1/N", metavar="I/N")
    args = parser.parse_args(argv)
    how, task = (args.frames, args.size or None), Task.parse(args.task)
    if Path(args.annotations).is_dir() or args.annotations.endswith((".yaml", ".yml")):
        if args.videos or args.captions:
            raise UserError(f"{args.annotations} is a set, which has its videos and captions already")
        out = store_again(args.annotations, args.out, *how, args.store, args.tolerance, args.workers, task)
    elif not args.videos:
        raise UserError(f"name the folder of the videos of {args.annotations} with --videos")
    else:
        out = annotations.pack_stories(
            *(args.annotations, args.videos, args.out, args.captions, *how),
            *(args.samples_per_shard, args.tolerance, args.workers, task, args.store),
        )
    if out:
        shards = ShardSet.open(out)
        print(f"{out}: {len(shards)} stories in {len(shards.shards)} shards")
    return 0


def describe(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lit_gen data describe",
        description="Write captions of every level for annotated videos with a local language model.",
    )
    parser.add_argument("annotations", help="JSON with the sentences of each video's segments")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a transformers instruct model")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines; what is there already is kept")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts answered together")
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="answers asked for until one is valid")
    parser.add_argument("--no-partial", action="store_true", help="only of whole videos")
    parser.add_argument("--again", action="store_true", help="also try once more what was refused before")
    args = parser.parse_args(argv)
    from lit_gen.data.annotations import read_annotations
    from lit_gen.data.describe import Writer, describe

    annotated = read_annotations(args.annotations)
    writer = Writer(args.model, args.device)
    parts = not args.no_partial
    written, refused = describe(annotated, writer, args.out, args.batch_size, args.attempts, parts, args.again)
    print(f"{args.out}: {written} captions written, {refused} refused")
    return 0
