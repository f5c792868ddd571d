"""How style transfer is judged: which reference goes with which prompt, against which baseline, by which measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from lit_gen.data.images import centre_crop, to_tensor
from lit_gen.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def partners(batch: dict[str, Any]) -> list[int]:
    """For each prompt of a batch the sample whose picture is its style reference: never one that shares its content.

    Content is the kinds of objects where facts tell them, the caption otherwise; if every other sample shares some of
    it, the one that shares least is taken.
    """
    content = _contents(batch)
    count = len(content)
    chosen = []
    for i, own in enumerate(content):
        others = [(i + k) % count for k in range(1, count)] or [i]
        chosen.append(min(others, key=lambda j: len(own & content[j])))
    return chosen


def strangers(batch: dict[str, Any], prompts: int, count: int) -> list[int]:
    """`count` samples to be references for all of the first `prompts` ones: those that share least content with any."""
    content = _contents(batch)
    taken = set().union(*content[:prompts])
    rest = range(prompts, len(content)) if len(content) > prompts else range(len(content))
    return sorted(rest, key=lambda j: len(content[j] & taken))[:count]


def _contents(batch: dict[str, Any]) -> list[set[Any]]:
    return [_content(caption, facts) for caption, facts in zip(batch["caption"], batch["facts"], strict=True)]


def _content(caption: str, facts: dict[str, Any]) -> set[Any]:
    return {kind for kind in facts["kind"] if kind >= 0} if "kind" in facts else {caption}


def in_nearest_style(facts: Sequence[dict[str, Any]], style_parameters: Tensor) -> tuple[list[str], Any]:
    """The strongest thing words can do: captions that name the style nearest to the wanted one, and their scenes.

    Args:
        facts: of B samples, their contents.
        style_parameters: the wanted styles, B P.
    """
    from lit_gen.data.facts import scenes_from_facts
    from lit_gen.world.grammar import captions
    from lit_gen.world.styles import NAMED, nearest_named

    named = nearest_named(style_parameters.cpu())
    scenes = scenes_from_facts(list(facts)).replace(style=named, style_parameters=NAMED[named])
    return [caption.text for caption in captions(scenes)], scenes


class PictureScores(nn.Module):
    """Of pictures: style error, share of right shapes and colours, leak of the reference's shape.

    Args:
        oracle: folder of the oracle.
    """

    def __init__(self, oracle: str) -> None:
        super().__init__()
        from lit_gen.metrics.prompt import ContentAccuracy, LeakRate
        from lit_gen.metrics.style import StyleError

        self.style, self.leak = StyleError(oracle), LeakRate(oracle)
        self.content = ContentAccuracy(oracle, ("shape", "colour"))

    def update(self, pictures: Tensor, scenes: Any, references: Any) -> None:
        """pictures B 3 H W; scenes of the prompts, and of the references, whose style is the wanted one."""
        reading = self.style.read(pictures)
        self.style.update(reading, references.style_parameters)
        self.content.update(reading, scenes)
        self.leak.update(reading, scenes, references)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; forgets what was seen."""
        scores = {
            "style error": self.style.compute()["error"],
            "content accuracy": self.content.compute(),
            "leak rate": self.leak.compute(),
        }
        for metric in (self.style, self.content, self.leak):
            metric.reset()
        return scores


class ClipScores(nn.Module):
    """Of clips: flicker and how often the motion is right; with an oracle also the style error of the middle frame.

    Args:
        oracle: folder of the oracle, or None for flicker alone.
    """

    def __init__(self, oracle: str | None) -> None:
        super().__init__()
        from lit_gen.metrics.style import StyleError
        from lit_gen.metrics.video import Flicker, MotionAccuracy

        self.flicker, self.real_flicker = Flicker(), Flicker()
        self.motion = MotionAccuracy(oracle) if oracle else None
        self.style = StyleError(oracle) if oracle else None

    def update(self, clips: Tensor, real: Tensor, scenes: Any | None, style_parameters: Tensor | None) -> None:
        """clips and real B F 3 H W; scenes of the prompts and wanted styles B P where they are known."""
        self.flicker.update(clips)
        self.real_flicker.update(real)
        if self.motion is not None and scenes is not None:
            self.motion.update(clips, scenes)
            self.style.update(clips[:, clips.shape[1] // 2], style_parameters)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; forgets what was seen."""
        flicker, real = self.flicker.compute(), self.real_flicker.compute()
        scores = {"flicker": flicker, "flicker, times real": flicker / real}
        if self.motion is not None and self.motion.update_called:
            scores["motion accuracy"] = self.motion.compute()["motion"]
            scores["style error"] = self.style.compute()["error"]
        for metric in (self.flicker, self.real_flicker, self.motion, self.style):
            if metric is not None:
                metric.reset()
        return scores


def read_references(paths: Sequence[str], size: int) -> list[tuple[str, Tensor]]:
    """Style references from picture files and folders of them: (name, 3 size size in [-1, 1]), centre cropped.

    Raises:
        UserError: a path that does not exist, a folder without pictures, or a file that is no picture.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise UserError(f"style {str(path)!r}: the folder has no pictures ({', '.join(PICTURES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"style {str(path)!r}: no such file or folder")
    return [(file.stem, _read_picture(file, size)) for file in files]


def _read_picture(file: Path, size: int) -> Tensor:
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"style {str(file)!r} is not a picture that can be read") from error
    return to_tensor(centre_crop(picture, size))
