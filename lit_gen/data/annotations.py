"""Packing annotated long videos (ActivityNet-Captions, QuerYD, LF-VILA and their like) into shards of stories.

Annotations are JSON, in either of two forms:

    {"v_abc": {"sentences": ["A man …", "He …"], "timestamps": [[0.0, 9.5], [9.5, 31.0]]}, …}      (ActivityNet's)
    [{"video": "abc", "segments": [{"start": 0.0, "end": 9.5, "text": "A man …"}, …]}, …]

and synthetic captions are JSON lines, as `python -m lit_gen data describe` writes them:

    {"video": "abc", "level": "full-short", "text": "man repairs bicycle"}

A video is the file FOLDER/abc.EXT, or the folder FOLDER/abc/ of its extracted frames, in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lit_gen.data.decode import VIDEO
from lit_gen.data.shards import Shard
from lit_gen.data.split import Job, Samples
from lit_gen.data.storage import Store, stored
from lit_gen.data.stories import END_MARKS, FULL
from lit_gen.data.write import write_index
from lit_gen.errors import ShardError, nearest
from lit_gen.task import Task

logger = logging.getLogger(__name__)

_LONGEST_PART = 3  # segments of a partial caption
_NAMED = 5  # files that are named when many are missing


@dataclass
class Annotated:
    """One video's annotation."""

    video: str
    sentences: list[str]  # of its segments, in order of time; none is empty
    times: list[list[float]] = field(default_factory=list)  # start and end of each, seconds; empty where not known
    captions: list[dict[str, Any]] = field(default_factory=list)  # synthetic ones: "level" and "text"

    @property
    def paragraph(self) -> str:
        """What the whole video is described by: every segment's sentence, in order, as one text."""
        return join(self.sentences)

    def partials(self) -> list[dict[str, Any]]:
        """Captions of runs of one to three neighbouring segments, but not of all."""
        count = len(self.sentences)
        spans = [
            (first, first + length)
            for length in range(1, min(_LONGEST_PART, count - 1) + 1)
            for first in range(count - length + 1)
        ]
        return [{"level": "partial", "text": join(self.sentences[a:b]), "span": [a, b]} for a, b in spans]

    def story(self, number: int) -> dict[str, Any]:
        """As a sample's JSON holds it."""
        captions = [{"level": FULL, "text": self.paragraph}, *self.partials(), *self.captions]
        return {"id": number, "video": self.video, "captions": captions, "times": self.times}


def join(sentences: list[str]) -> str:
    """Sentences as one text, each with its end mark."""
    clean = [" ".join(sentence.split()) for sentence in sentences]
    return " ".join(sentence if sentence[-1] in END_MARKS else f"{sentence}." for sentence in clean)


def read_annotations(file: str | Path) -> list[Annotated]:
    """Annotations of either form, in the order of the videos' names; videos without a sentence are left out, and named.

    Raises:
        ShardError: not such a file, or a video comes twice.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=partial(_unique, file))
    except FileNotFoundError:
        raise ShardError(f"annotations {file} do not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{file} is not valid JSON: {error}") from None
    if isinstance(content, dict):
        content = [{"video": name, **_mapping(entry, file, name)} for name, entry in content.items()]
    if not isinstance(content, list) or not content:
        raise ShardError(f"{file} holds no annotations; the forms that are read stand in data/README.md")
    found: dict[str, Annotated] = {}
    for number, entry in enumerate(content):
        one = _annotated(_mapping(entry, file, number), file, number)
        if one.video in found:
            raise ShardError(f"{file}: video {one.video} is annotated twice")
        found[one.video] = one
    empty = [name for name, one in found.items() if not one.sentences]
    for name in empty:
        logger.warning("data: %s: %s has no sentence and is left out", file, name)
        del found[name]
    if not found:
        raise ShardError(f"{file}: no video has a sentence")
    return [found[name] for name in sorted(found)]


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ShardError(f"{file}: {next(n for n in names if names.count(n) > 1)} is there twice")
    return content


def _mapping(entry: Any, file: Path, where: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ShardError(f"{file}: {where} is no object but {str(entry)[:40]!r}")
    return entry


def _annotated(entry: dict[str, Any], file: Path, number: int) -> Annotated:
    name = entry.get("video")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ShardError(f"{file}: entry {number} has no `video`, the plain name of its file, but {name!r}")
    segments = entry.get("segments")
    if segments is None:
        sentences, times = entry.get("sentences"), entry.get("timestamps") or []
    else:
        rows = [_mapping(s, file, name) for s in segments]
        sentences, times = [s.get("text") for s in rows], [[s.get("start"), s.get("end")] for s in rows]
        times = [] if any(None in pair for pair in times) else times
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise ShardError(f"{file}: {name} has neither `sentences` (texts) nor `segments` (objects with a `text`)")
    if times and len(times) != len(sentences):
        raise ShardError(f"{file}: {name} has {len(sentences)} sentences but {len(times)} timestamps")
    order = sorted(range(len(sentences)), key=lambda i: times[i][0]) if times else range(len(sentences))
    order = [i for i in order if sentences[i].strip()]
    return Annotated(name, [sentences[i] for i in order], [times[i] for i in order] if times else [])


def add_captions(annotated: list[Annotated], file: str | Path) -> None:
    """Add synthetic captions from JSON lines. ShardError where one has no video, or is not as described above."""
    from lit_gen.world.stories.tell import LEVELS

    by_name = {one.video: one for one in annotated}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ShardError(f"captions file {file} does not exist") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, level, text = (row[key] for key in ("video", "level", "text"))
        except (ValueError, KeyError, TypeError):
            raise ShardError(f"{file}:{number}: not an object with `video`, `level` and `text`") from None
        if not all(isinstance(value, str) for value in (name, level, text)):
            raise ShardError(f"{file}:{number}: `video`, `level` and `text` must be texts")
        if name not in by_name:
            raise ShardError(f"{file}:{number}: a caption of {name}, which the annotations do not have")
        if level == FULL or not text.strip():
            raise ShardError(f"{file}:{number}: an empty caption, or a second paragraph, of {name}")
        if level not in LEVELS:
            raise ShardError(f"{file}:{number}: there is no level `{level}`{nearest(level, LEVELS)}")
        by_name[name].captions.append({key: row[key] for key in ("level", "text", "span") if key in row})


# -- packing ----------------------------------------------------------------------------------------------------------


def pack_stories(
    annotations: str | Path,
    videos: str | Path,
    out: str | Path,
    captions: list[str] | None = None,
    frames: int = 64,
    size: int | None = 256,
    samples_per_shard: int = 100,
    tolerance: float = 0.01,
    workers: int = 1,
    task: Task = Task(),
    store: Store = "mp4",
) -> Path | None:
    """Pack annotated videos into shards in `out`, which must not exist.

    Args:
        annotations, captions: files as described above.
        videos: folder of the videos, or of folders of frames.
        frames, size, store: how videos are stored, see `storage.stored`.
        tolerance: share of videos that may be missing or unreadable; they are named and left out.
        workers: processes that decode.
        task: the part of the shards to write.

    Returns:
        `out`, or None while other tasks have yet to write their part.

    Raises:
        ShardError: what is wrong with the annotations, the videos or `out`.
    """
    out, folder = Path(out), Path(videos)
    if out.exists():
        raise ShardError(f"{out} exists already; remove it or choose another --out")
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder")
    annotated = read_annotations(annotations)
    for file in captions or []:
        add_captions(annotated, file)
    there = _media(folder)
    missing = [one.video for one in annotated if one.video not in there]
    if len(missing) > tolerance * len(annotated):
        raise ShardError(
            f"{len(missing)} of {len(annotated)} annotated videos are not in {folder} (more than {tolerance:.1%}), "
            f"e.g. {', '.join(missing[:_NAMED])}; raise --tolerance to leave them out"
        )
    for name in missing:
        logger.warning("data: %s is annotated but not in %s; left out", name, folder)
    # Numbers are those of all that is annotated, so that a missing video changes no other's.
    work = [(number, one, there[one.video]) for number, one in enumerate(annotated) if one.video in there]
    # With the state of every file: where one was repaired, the leavings of an attempt that failed are not continued.
    about = [[one.story(i), _state(path)] for i, one, path in work]
    settings = json.dumps([about, str(folder.resolve()), frames, size, samples_per_shard, store])
    source = hashlib.sha256(settings.encode()).hexdigest()
    sizes = [min(samples_per_shard, len(work) - first) for first in range(0, len(work), samples_per_shard)]

    def index(building: Path, shards: list[Shard]) -> None:
        lost = len(work) - sum(shard.samples for shard in shards)
        if lost + len(missing) > tolerance * len(annotated):
            raise ShardError(f"{lost} of {len(work)} videos cannot be read (more than {tolerance:.1%}); see the log")
        about = {"packed_from": Path(annotations).name, "kind": "stories"}
        write_index(building, "stories", [s for s in shards if s.samples], about, source)

    start = partial(_packer, work, samples_per_shard, frames, size, store)
    job = Job(out, source[:12], f"packing {out.name}", sizes, start, index)
    return out if job.run(task, ["cpu"] * workers, out.exists) else None


def _media(folder: Path) -> dict[str, Path]:
    """Name -> video file, or folder of frames; ActivityNet's files may lack the "v_" of its annotations."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix[1:].lower() in VIDEO else path.name if path.is_dir() else None
        if name is None:
            continue
        if name in found:
            raise ShardError(f"{folder} has {found[name].name} and {path.name}, two videos of one name")
        found[name] = path
    return found | {f"v_{name}": path for name, path in found.items() if f"v_{name}" not in found}


def _state(path: Path) -> list[list[Any]]:
    """Name, size and time of change of a video, or of all that is in a folder of frames."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [[file.name, status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]


def _packer(
    work: list[tuple[int, Annotated, Path]],
    each: int,
    frames: int,
    size: int | None,
    store: Store,
    _: Path,
    __: str,
) -> Samples:
    def samples(number: int) -> Iterator[dict[str, str | bytes]]:
        for i, one, path in work[number * each : (number + 1) * each]:
            try:
                extension, data = stored(path, frames, size, store)
            except (OSError, ValueError) as error:
                logger.warning("data: %s left out: %s", path, error)
                continue
            key = f"{i:08d}-" + re.sub(r"[^\w-]+", "-", one.video)[:60]
            story = json.dumps(one.story(i), separators=(",", ":")).encode()
            yield {"__key__": key, extension: data, "txt": one.paragraph.encode(), "json": story}

    return samples
