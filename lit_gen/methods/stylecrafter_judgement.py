"""What StyleCrafter's validation and test draw, and the measures that they are judged by."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.data.facts import scenes_from_facts
from lit_gen.errors import UserError
from lit_gen.methods.style_transfer import (
    ClipScores,
    PictureScores,
    Values,
    in_nearest_style,
    partners,
    plain_prompts,
    strangers,
)
from lit_gen.metrics.scores import Scores

if TYPE_CHECKING:
    from lit_gen.methods.stylecrafter import StyleCrafter

# Groups of validation scalars: our pictures, and those of the untouched base told the nearest style's name.
ADAPTER, WORDS = "adapter", "base with style words"
COLUMNS = ("image", "video", "style", "style_parameters", "caption", "key", "facts", "valid")
SHOWN = 4  # prompts, and styles, in a preview


class Judgement(nn.Module):
    """Draws the samples of validation batches and keeps their scores, as means and one by one.

    Args:
        stage: of the method: "adapter" is judged by pictures, others by clips.
        oracle: folder of the oracle, or None for data without ground truth.
    """

    def __init__(self, stage: str, oracle: str | None) -> None:
        super().__init__()
        judged = stage == "adapter" and oracle is not None
        self.pictures = nn.ModuleDict({name: PictureScores(oracle) for name in (ADAPTER, WORDS)} if judged else {})
        self.clips = None if stage == "adapter" else ClipScores(oracle)
        self.table = Scores()

    def judge_pictures(self, model: StyleCrafter, batch: dict[str, Any]) -> None:
        """Score each prompt in the style of another sample, and the base that is told the nearest style's name."""
        if not self.pictures:
            return
        known = ["style_parameters" in facts for facts in batch["facts"]]
        if not all(known):
            raise UserError(
                f"{batch['key'][known.index(False)]} is no picture of the world, so that the oracle cannot judge what "
                "is drawn for it; set model.oracle to null"
            )
        chosen = partners(batch)
        seeds = [seed_of(key) for key in batch["key"]]
        scenes = scenes_from_facts(batch["facts"]).to(model.device)
        references = scenes[torch.tensor(chosen, device=model.device)]
        drawn = model.sample(plain_prompts(batch), batch["style"][chosen], seeds)
        self._keep(batch, self.pictures[ADAPTER].update(drawn, scenes, references))
        words, named = in_nearest_style(batch["facts"], scenes.style_parameters[chosen])
        drawn = model.sample(words, None, seeds)
        values = self.pictures[WORDS].update(drawn, named.to(model.device), references)
        self._keep(batch, {f"{name}, {WORDS}": value for name, value in values.items()})

    def show_pictures(self, model: StyleCrafter, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A sheet of the first prompts in the styles of some of the other samples."""
        count = max(min(SHOWN, len(batch["caption"]) // 2), 1)
        references = list(batch["style"][strangers(batch, count, count)])
        return {"prompts x styles": prompts_in_styles(model, plain_prompts(batch)[:count], references)}

    def judge_clips(self, model: StyleCrafter, batch: dict[str, Any], show: bool) -> dict[str, Tensor]:
        """Score each prompt's clip in the style of another clip against real clips; returns what is to be shown."""
        chosen, video = partners(batch), batch["video"]
        prompts = plain_prompts(batch)
        references = random_view(video[chosen, 0], model.style_zoom)
        seeds = [seed_of(key) for key in batch["key"]]
        clips = model.sample(prompts, references, seeds, frames=video.shape[1])
        known = all("style_parameters" in facts for facts in batch["facts"])
        scenes = scenes_from_facts(batch["facts"]).to(model.device) if known else None
        wanted = scenes[torch.tensor(chosen, device=model.device)] if known else None
        self._keep(batch, self.clips.update(clips, video, scenes, wanted))
        if not show:
            return {}
        rows = [list(part[:SHOWN]) for part in (references, clips, video)]
        apart = max(video.shape[1] // SHOWN, 1)
        return {
            "clips": contact_sheet(rows, prompts[:SHOWN], ["reference", "generated", "real clip in its own style"]),
            "frames": contact_sheet([list(clip[::apart][:SHOWN]) for clip in clips[:SHOWN]], rows=rows[0]),
        }

    def scalars(self) -> dict[str, Tensor]:
        """Means by name; forgets what they are of."""
        groups = {name: scores.compute() for name, scores in self.pictures.items()}
        if self.clips is not None:
            groups["clips"] = self.clips.compute()
        found = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        if self.pictures:
            ratio = groups[ADAPTER]["style error"] / groups[WORDS]["style error"]
            found["style error, adapter over words"] = ratio
        return found

    def _keep(self, batch: dict[str, Any], values: Values) -> None:
        self.table.add(list(batch["key"]), **values)


def prompts_in_styles(model: StyleCrafter, prompts: Sequence[str], references: Sequence[Tensor]) -> Tensor:
    """One sheet 3 H W of every prompt (columns) in every style (rows, references 3 h w in front)."""
    seeds = [seed_of(prompt) for prompt in prompts]
    read = (model.read(own[None]).expand(len(prompts)) for own in references)
    rows = [list(model.sample(prompts, own, seeds)) for own in read]
    return contact_sheet(rows, prompts, list(references))


def random_view(images: Tensor, zoom: float) -> Tensor:
    """A random crop of each image B 3 H W after enlarging it by `zoom`: the style is kept, the layout is not."""
    height, width = images.shape[-2:]
    large = F.interpolate(images, scale_factor=zoom, mode="bicubic", antialias=True).clamp(-1, 1)
    tops = torch.randint(large.shape[-2] - height + 1, (len(images),)).tolist()
    lefts = torch.randint(large.shape[-1] - width + 1, (len(images),)).tolist()
    return torch.stack([x[:, i : i + height, j : j + width] for x, i, j in zip(large, tops, lefts, strict=True)])


def seed_of(*names: str | int) -> int:
    """A seed that depends on the names alone, so that a sample is the same in any batch and on any rank."""
    return zlib.crc32(" ".join(map(str, names)).encode())


def real_samples(batch: dict[str, Any]) -> dict[str, Any]:
    """A validation batch without the samples that only fill its last batch up."""
    if "valid" not in batch or bool(batch["valid"].all()):
        return batch
    keep = batch["valid"].nonzero().squeeze(1).tolist()
    chosen = {k: v[keep] if isinstance(v, Tensor) else [v[i] for i in keep] for k, v in batch.items() if k in COLUMNS}
    return batch | chosen
