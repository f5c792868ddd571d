"""Set files: `data/*.yaml` say which scenes of the world, or which packed shards, make up a set."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lit_gen.errors import ShardError
from lit_gen.world.grammar import LEVELS
from lit_gen.world.recipes import RECIPES

CHOICES = {
    "kind": ("images", "videos", "style", "stories"),
    "recipe": tuple(RECIPES),
    "split": ("train", "val", "test"),
    "level": LEVELS,
    "mp4": ("exact", "ordinary"),
}


@dataclass(frozen=True)
class Captions:
    """How the world's grammar words the captions."""

    level: str = "full"
    style_words: bool = True


@dataclass(frozen=True)
class SetFile:
    """A set of world renders; every field is a key of the YAML file."""

    path: Path  # the file itself, not a key
    name: str  # folder of the shards below `shards/` beside the file; defaults to the file's name
    kind: str  # images | videos | style (images with style parameters as ground truth) | stories (long videos)
    recipe: str  # which scenes, see lit_gen/world/recipes.py
    split: str  # train | val | test
    count: int  # samples
    seed: int = 0
    size: int = 64  # pixels, height and width
    frames: int = 8  # of a video, or of each event of a story
    captions: Captions = field(default_factory=Captions)
    samples_per_shard: int = 250
    mp4: str = "exact"  # of a story: nearly lossless, or as videos of elsewhere are, see `decode.encode_video`

    @property
    def folder(self) -> Path:
        """Where the built shards are."""
        return self.path.parent / "shards" / self.name

    @property
    def description(self) -> dict:
        """The content as plain data, without the path."""
        content = {k: v for k, v in dataclasses.asdict(self).items() if k != "path"}
        if self.mp4 == "exact":  # which sets were before there was a choice: they stay what they are
            del content["mp4"]
        return content

    @staticmethod
    def read(path: str | Path) -> SetFile:
        """Read and check a set file; ShardError names the file, the key and the nearest valid one."""
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            guess = f"; did you mean {path.parent / near[0]}?" if near else ""
            raise ShardError(f"set file {path} does not exist{guess}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ShardError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ShardError(f"{path}: a set file is a mapping of keys, see data/README.md")
        captions = _checked(Captions, content.pop("captions", None) or {}, f"{path}: captions")
        content.setdefault("name", path.stem)
        if not re.fullmatch(r"\w[\w.+-]*", str(content["name"])):  # building replaces the folder of this name
            raise ShardError(f"{path}: name must be a plain name of a folder, not {content['name']!r}")
        content.pop("description", None)
        found = _checked(SetFile, content, str(path), path=path, captions=captions)
        if found.kind == "videos" and found.frames < 2:
            raise ShardError(f"{path}: frames must be at least 2 for videos, not {found.frames}")
        if found.mp4 == "ordinary" and found.size % 2:  # their colours are stored at half the size
            raise ShardError(f"{path}: size must be even for mp4: ordinary, not {found.size}")
        return found


def _checked(cls: type, content: dict, where: str, **given):
    """An instance of a dataclass from YAML values whose names, presence and types are checked."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in given}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise ShardError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = fields[key].type
        if type(value).__name__ != wanted:
            raise ShardError(f"{where}: {key} must be {wanted}, not {value!r}")
        if wanted == "int" and value < (0 if key == "seed" else 1):
            raise ShardError(f"{where}: {key} must be positive, not {value}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ShardError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    missing = [n for n, f in fields.items() if n not in content and _required(f)]
    if missing:
        raise ShardError(f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return cls(**content, **given)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
