"""How style transfer is judged: which reference goes with which prompt, against which baseline, by which measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_gen.data.facts import scenes_from_facts
from lit_gen.data.styled import strip_style
from lit_gen.metrics.agreement import compare
from lit_gen.metrics.prompt import ContentAccuracy, LeakRate
from lit_gen.metrics.reading import Reading
from lit_gen.metrics.video import Flicker, MotionAccuracy, flicker
from lit_gen.world import grammar
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import style_error

CONTENT = ("shape", "colour")  # what of a prompt must survive any style
Values = dict[str, Tensor]  # of single samples, B each, by the name of the measure; nan where one does not apply


# -- which reference goes with which prompt ---------------------------------------------------------------------------


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


# -- prompts ----------------------------------------------------------------------------------------------------------


def plain_prompts(batch: dict[str, Any]) -> list[str]:
    """The captions of a batch without what they say of the style, whatever the model is trained on."""
    plain = [strip_style(caption) for caption in batch["caption"]]
    return [
        grammar.strip_style(caption) if "style_parameters" in facts else caption
        for caption, facts in zip(plain, batch["facts"], strict=True)
    ]


def in_nearest_style(facts: Sequence[dict[str, Any]], style_parameters: Tensor) -> tuple[list[str], Scenes]:
    """The strongest thing words can do: captions that name the style nearest to the wanted one, and their scenes.

    Args:
        facts: of B samples, their contents.
        style_parameters: the wanted styles, B P.
    """
    from lit_gen.world.styles import NAMED, nearest_named

    named = nearest_named(style_parameters.cpu())
    scenes = scenes_from_facts(list(facts)).replace(style=named, style_parameters=NAMED[named])
    return [caption.text for caption in grammar.captions(scenes)], scenes


# -- measures ---------------------------------------------------------------------------------------------------------


def values_of(reading: Reading, scenes: Scenes, references: Scenes) -> Values:
    """What the oracle found in single pictures.

    Args:
        reading: of B pictures.
        scenes: B, of their prompts.
        references: B, of their references, whose style is the wanted one.
    """
    agreement = compare(reading, scenes)
    right = sum((agreement.right[name] & agreement.counted[name]).sum(1) for name in CONTENT)
    accuracy = right / sum(agreement.counted[name].sum(1) for name in CONTENT)
    nothing = torch.full_like(accuracy, torch.nan)
    foreign = references.kind[:, :1]
    shown = ((reading.kind == foreign) & reading.present).any(1)
    return {
        "style error": style_error(reading.style_parameters, references.style_parameters),
        "content accuracy": accuracy,
        "content accuracy of several objects": accuracy.where((scenes.kind >= 0).sum(1) > 1, nothing),
        "leak rate": shown.to(accuracy.dtype).where((scenes.kind != foreign).all(1), nothing),
    }


class PictureScores(nn.Module):
    """Of pictures: style error, share of right shapes and colours, leak of the reference's shape.

    Args:
        oracle: folder of the oracle.
    """

    def __init__(self, oracle: str) -> None:
        super().__init__()
        # A mean, not the metric that keeps all readings: a rank without any could not be gathered from.
        self.style, self.leak = MeanMetric(), LeakRate(oracle)
        self.content = ContentAccuracy(oracle, CONTENT)

    def update(self, pictures: Tensor, scenes: Scenes, references: Scenes) -> Values:
        """pictures B 3 H W; scenes of the prompts, and of the references, whose style is the wanted one."""
        reading = self.content.read(pictures)
        self.content.update(reading, scenes)
        self.leak.update(reading, scenes, references)
        values = values_of(reading, scenes, references)
        self.style.update(values["style error"])
        return values

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; forgets what was seen."""
        scores = {
            "style error": self.style.compute(),
            "content accuracy": self.content.compute(),
            "leak rate": self.leak.compute(),
        }
        for metric in (self.style, self.content, self.leak):
            metric.reset()
        return scores


class ClipScores(nn.Module):
    """Of clips: flicker, and with an oracle whether the motion is right, what the middle frame shows, style drift.

    Args:
        oracle: folder of the oracle, or None for flicker alone.
    """

    def __init__(self, oracle: str | None) -> None:
        super().__init__()
        self.flicker, self.real_flicker = Flicker(), Flicker()
        self.motion = MotionAccuracy(oracle) if oracle else None
        self.pictures = PictureScores(oracle) if oracle else None

    def update(self, clips: Tensor, real: Tensor, scenes: Scenes | None, references: Scenes | None) -> Values:
        """clips and real B F 3 H W; scenes of the prompts and of the references where they are known."""
        self.flicker.update(clips)
        self.real_flicker.update(real)
        values = {"flicker": flicker(clips.float())}
        if self.motion is not None and scenes is not None and references is not None:
            seen = self.motion.oracle(clips.device).read_video(clips)
            self.motion.update(seen, scenes)
            values["motion accuracy"] = (seen.motion == scenes.motion.clamp(min=0)).float()
            values |= self.pictures.update(clips[:, clips.shape[1] // 2], scenes, references)
            values["style drift"] = self.drift(clips)
        values = {f"{name} of clips": value for name, value in values.items()}
        # Beside each other, not as a ratio: where a real clip hardly flickers it is huge, and so is a mean over clips.
        return values | {"flicker of real clips": flicker(real.float())}

    def drift(self, clips: Tensor) -> Tensor:
        """Mean style error between neighbouring frames of clips B F 3 H W: B; 0 if the style stays what it is."""
        style = self.motion.read(clips.flatten(0, 1)).style_parameters.unflatten(0, clips.shape[:2])
        before, after = style[:, :-1], style[:, 1:]
        return style_error(before.flatten(0, 1), after.flatten(0, 1)).unflatten(0, before.shape[:2]).mean(1)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; forgets what was seen."""
        real, generated = self.real_flicker.compute(), self.flicker.compute()
        scores = {"flicker": generated, "flicker, times real": generated / real}
        if self.motion is not None:
            # Over all ranks: one may have seen nothing, and the others wait for its part.
            right = self.motion.compute()["motion"]
            if not right.isnan():
                scores |= {"motion accuracy": right, **self.pictures.compute()}
        for metric in (self.flicker, self.real_flicker, self.motion):
            if metric is not None:
                metric.reset()
        return scores
