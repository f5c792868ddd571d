"""`python -m lit_gen data pack-stories` and `data describe`: annotated long videos, and captions written for them."""

from __future__ import annotations

import argparse

from lit_gen.data.shards import ShardSet
from lit_gen.data.split import Task


def pack_stories(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lit_gen data pack-stories", description="Pack annotated long videos into shards of stories."
    )
    parser.add_argument("annotations", help="JSON with the sentences of each video's segments")
    parser.add_argument("--videos", required=True, metavar="FOLDER", help="videos, or folders of their frames")
    parser.add_argument("--out", required=True, help="folder of the new set, e.g. data/shards/activitynet")
    parser.add_argument("--captions", action="append", metavar="FILE", help="JSON lines of synthetic captions")
    parser.add_argument("--frames", type=int, default=64, metavar="N", help="kept of each video; 0 keeps whole files")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="short side of the frames; 0 for all")
    parser.add_argument("--samples-per-shard", type=int, default=100, metavar="N")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="SHARE", help="of videos that may be missing or unreadable"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--task", help="part of the shards to write, 0/N to N-1/N", metavar="I/N")
    args = parser.parse_args(argv)
    from lit_gen.data import annotations

    out = annotations.pack_stories(
        *(args.annotations, args.videos, args.out, args.captions, args.frames, args.size or None),
        *(args.samples_per_shard, args.tolerance, args.workers, Task.parse(args.task)),
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
    args = parser.parse_args(argv)
    from lit_gen.data.annotations import read_annotations
    from lit_gen.data.describe import Writer, describe

    annotated = read_annotations(args.annotations)
    writer = Writer(args.model, args.device)
    written, refused = describe(annotated, writer, args.out, args.batch_size, args.attempts, not args.no_partial)
    print(f"{args.out}: {written} captions written, {refused} refused")
    return 0
