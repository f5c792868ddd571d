"""Searching folders of videos: an index that persists and grows, and answers as a table and a sheet of frames."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_gen.callbacks.samples import contact_sheet, save
from lit_gen.data.decode import VIDEO
from lit_gen.data.frames import fitted, read_frames
from lit_gen.data.images import to_tensor
from lit_gen.errors import UserError
from lit_gen.retrieval import embeddings
from lit_gen.retrieval.ranking import top

logger = logging.getLogger(__name__)

_FILE = "videos.safetensors"
_SHOWN = 4  # frames of each video on a sheet


@dataclass
class Index:
    """Features of the videos of some folders. A file is known by its path, size and time of change."""

    place: Path
    model: str  # fingerprint of the weights
    files: dict[str, str]  # all there are now: path -> size and time
    features: dict[str, Tensor] = field(default_factory=dict)  # path -> D, unit
    stamps: dict[str, str] = field(default_factory=dict)  # of `features`
    bad: dict[str, str] = field(default_factory=dict)  # path -> why it cannot be read

    @classmethod
    def open(cls, place: Path, model: str, folders: list[Path]) -> Index:
        """The index kept at `place`, for the videos that are in the folders now.

        Raises:
            UserError: a folder is none, or there is no video in any of them.
        """
        files: dict[str, str] = {}
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder")
            for file in sorted(folder.rglob("*")):
                if file.suffix[1:].lower() in VIDEO and file.is_file():
                    status = file.stat()
                    files[str(file)] = f"{status.st_size} {status.st_mtime_ns}"
        if not files:
            raise UserError(f"{', '.join(map(str, folders))}: no videos there ({', '.join(VIDEO)})")
        index = cls(place, model, files)
        stored = embeddings.read(place / _FILE)
        if stored is not None and stored[1].get("model") == model:
            for (name, stamp), feature in zip(json.loads(stored[1]["files"]), stored[0]["features"], strict=True):
                index.features[name], index.stamps[name] = feature, stamp
        return index

    def missing(self) -> list[str]:
        """Videos that are not in the index, or have changed since."""
        return [name for name, stamp in self.files.items() if self.stamps.get(name) != stamp]

    def add(self, name: str, feature: Tensor) -> None:
        self.features[name], self.stamps[name] = feature, self.files[name]

    def leave_out(self, name: str, reason: str) -> None:
        """A video that cannot be read (any more): what was known of an earlier state of it says nothing of this one."""
        logger.warning("%s left out: %s", name, reason)
        self.bad[name] = reason
        self.features.pop(name, None)
        self.stamps.pop(name, None)

    def save(self) -> None:
        """Keep everything, also what other folders gave.

        Raises:
            UserError: of the folders asked for now, no video can be read.
        """
        if names := list(self.features):
            about = {"model": self.model, "files": json.dumps([[name, self.stamps[name]] for name in names])}
            embeddings.write(self.place / _FILE, {"features": torch.stack([self.features[n] for n in names])}, about)
        if not self.files.keys() & self.features.keys():
            raise UserError(
                f"none of the {len(self.files)} videos can be read; the first: {next(iter(self.bad.values()))}"
            )

    def summary(self) -> str:
        known = sum(name in self.features for name in self.files)
        bad = f", {len(self.bad)} cannot be read" if self.bad else ""
        return f"{known} videos in the index {self.place / _FILE}{bad}"

    def find(self, queries: Tensor, k: int) -> list[list[tuple[str, float]]]:
        """For each query (Q D, unit) the k nearest videos of the folders with their cosines, best first."""
        names = [name for name in self.files if name in self.features]
        scores, rows = top(queries, torch.stack([self.features[name] for name in names]), k)
        return [
            [(names[i], s) for i, s in zip(row, values, strict=True)]
            for row, values in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


class NewVideos(Dataset):
    """(path, frames F 3 size size bytes, or why they cannot be read) of the videos that an index lacks."""

    def __init__(self, index: Index, frames: int, size: int) -> None:
        self.names, self.frames, self.size = index.missing(), frames, size

    def __len__(self) -> int:
        return max(1, len(self.names))  # a trainer skips the end of a loop that had nothing to do

    def __getitem__(self, number: int) -> tuple[str, Tensor | str]:
        if not self.names:
            return "", ""
        name = self.names[number]
        try:
            return name, torch.from_numpy(fitted(read_frames(Path(name), self.frames), self.size)).movedim(-1, -3)
        except (OSError, ValueError) as error:
            return name, str(error)


def answer(descriptions: list[str], answers: list[list[tuple[str, float]]], folder: Path) -> str:
    """Write `answers.csv` and `answers.png` to a folder; returns the table as text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["description", "place", "video", "cosine"])
        for text, found in zip(descriptions, answers, strict=True):
            lines.append(f"\n{text}")
            for place, (name, score) in enumerate(found, 1):
                writer.writerow([text, place, name, f"{score:.4f}"])
                lines.append(f"  {place:2d}  {score:6.3f}  {name}")
    cells = [[_strip(name) for name, _ in found] for found in answers]
    titles = [str(place) for place in range(1, len(cells[0]) + 1)]
    sheet = save(folder / "answers", contact_sheet(cells, titles, descriptions, size=128))
    return "\n".join([*lines, "", f"drawn: {sheet}"])


def _strip(name: str) -> Tensor:
    """Four frames of a video in a square: 3 H W."""
    shown = to_tensor(fitted(read_frames(Path(name), _SHOWN), 64))
    return torch.cat([torch.cat(list(shown[:2]), -1), torch.cat(list(shown[2:]), -1)], -2)
