"""Features of videos and texts kept in safetensors, for as long as the weights that gave them are the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_gen.data.encoded import beside_weights
from lit_gen.files import write_tensors


def fingerprint_of(method: Any) -> str:
    """sha256 of all weights of a dual encoder, frozen ones too, and of how many tokens of a text it reads."""
    digest = hashlib.sha256(f"{method.text_encoder.max_tokens} {beside_weights(method)}".encode())
    for name, weight in sorted(nn.Module.state_dict(method).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of(text: str) -> int:
    """A number below 2**63 that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass
class Embeddings:
    """Features D by video id (unit vectors) and by text (as theta_t gives them).

    Each rank writes a file of its own and reads all.
    """

    folder: Path
    model: str  # fingerprint of the weights
    depends: dict[str, str]  # what else the videos' features depend on
    by_id: dict[int, Tensor] = field(default_factory=dict)
    by_hash: dict[int, Tensor] = field(default_factory=dict)
    changed: bool = False

    @classmethod
    def open(cls, folder: Path, model: str, depends: dict[str, str]) -> Embeddings:
        """Those in a folder that are still good; others are left aside, and replaced when these are saved."""
        found = cls(folder, model, depends)
        for file in sorted(folder.glob("rank-*.safetensors")):
            stored = read(file)
            if stored is None or stored[1].get("model") != model:
                continue
            tensors, about = stored
            found.by_hash |= dict(zip(tensors["texts"].tolist(), tensors["text_features"], strict=True))
            if json.loads(about.get("depends", "{}")) == depends:
                found.by_id |= dict(zip(tensors["videos"].tolist(), tensors["video_features"], strict=True))
        return found

    def videos(self, ids: list[int]) -> Tensor | None:
        """Features of videos, B D, if all are known."""
        if not ids or not all(number in self.by_id for number in ids):
            return None
        return torch.stack([self.by_id[number] for number in ids])

    def texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Those of the texts that are known, with their features."""
        pairs = ((text, self.by_hash.get(hash_of(text))) for text in texts)
        return {text: feature for text, feature in pairs if feature is not None}

    def add_videos(self, ids: list[int], features: Tensor) -> None:
        self.changed = self.changed or any(number not in self.by_id for number in ids)
        self.by_id |= dict(zip(ids, features, strict=True))

    def add_texts(self, features: dict[str, Tensor]) -> None:
        for text, feature in features.items():
            self.changed = self.changed or hash_of(text) not in self.by_hash
            self.by_hash[hash_of(text)] = feature

    def save(self) -> None:
        """Write this rank's file, whole or not at all."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.changed:
            tensors = {
                "videos": torch.tensor(list(self.by_id), dtype=torch.long),
                "video_features": _stacked(self.by_id),
                "texts": torch.tensor(list(self.by_hash), dtype=torch.long),
                "text_features": _stacked(self.by_hash),
            }
            write(
                self.folder / f"rank-{rank}.safetensors",
                tensors,
                {"model": self.model, "depends": json.dumps(self.depends)},
            )


def _stacked(features: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(features.values())) if features else torch.zeros(0, 0)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a safetensors file; None where there is none that can be read."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file whose earlier content stays until the new one is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, about)
