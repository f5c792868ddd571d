"""CLIP scores: with the base's own encoders, or with any CLIP a user names by its folder.

Blunt beside the oracle, but what papers report, and all there is for pictures of the real world.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lit_gen.diffusion.base import TRUSTED
from lit_gen.errors import UserError


class CLIPEncoders(nn.Module):
    """Text and image towers that share one space.

    Args:
        folder: either a transformers CLIP folder, or a base folder with tokenizer/, text_encoder/ (whose pooled output
            is the text embedding), image_encoder/ and feature_extractor/.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = Path(folder)
        self.joint = (folder / "config.json").is_file()
        parts = ("config.json",) if self.joint else ("tokenizer", "text_encoder", "image_encoder", "feature_extractor")
        missing = [name for name in parts if not (folder / name).exists()]
        if missing:
            raise UserError(f"{folder}: neither a CLIP folder nor a base with its own CLIP ({missing[0]} is missing)")
        if self.joint:
            self.text = self.vision = CLIPModel.from_pretrained(folder, **TRUSTED)
        else:
            self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", **TRUSTED)
            self.vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", **TRUSTED)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder if self.joint else folder / "tokenizer")
        # Read as plain numbers: the processor classes want torchvision, and resize on the CPU.
        processor = folder / ("" if self.joint else "feature_extractor") / "preprocessor_config.json"
        normal = json.loads(processor.read_text()) if processor.is_file() else {}
        self.size = self.vision.config.vision_config.image_size if self.joint else self.vision.config.image_size
        self.register_buffer(
            "mean", torch.tensor(normal.get("image_mean", OPENAI_CLIP_MEAN)).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(normal.get("image_std", OPENAI_CLIP_STD)).view(3, 1, 1), persistent=False
        )
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit embeddings of B texts: B D."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.mean.device)
        if self.joint:
            return F.normalize(_pooled(self.text.get_text_features(**tokens)), dim=-1)
        return F.normalize(self.text(input_ids=tokens.input_ids).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """Unit embeddings of images B 3 H W in [-1, 1]: B D. The short side is resized, the centre kept."""
        images = images.float().add(1).div(2).to(self.mean.device)
        scale = self.size / min(images.shape[-2:])
        if scale != 1:
            shape = [max(round(side * scale), self.size) for side in images.shape[-2:]]
            images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in images.shape[-2:])
        pixels = (images[..., top : top + self.size, left : left + self.size] - self.mean) / self.std
        if self.joint:
            return F.normalize(_pooled(self.vision.get_image_features(pixel_values=pixels)), dim=-1)
        return F.normalize(self.vision(pixel_values=pixels).image_embeds, dim=-1)


def _pooled(features: Tensor | object) -> Tensor:
    """The features themselves (transformers 4), or the projected ones of the output that transformers 5 returns."""
    return features if isinstance(features, Tensor) else features.pooler_output


@cache
def clip_encoders(folder: str) -> CLIPEncoders:
    """Encoders of a folder, loaded once and shared by all metrics of this process."""
    return CLIPEncoders(folder)


class _CLIPScore(Metric):
    full_state_update = False
    higher_is_better = True

    def __init__(self, encoders: CLIPEncoders | str = "data/world-base") -> None:
        super().__init__()
        # A function, so that the encoders are not registered: they must not enter checkpoints, and clones share them.
        self._load = (lambda: clip_encoders(encoders)) if isinstance(encoders, str) else (lambda: encoders)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pictures", torch.tensor(0.0), dist_reduce_fx="sum")

    def _add(self, cosine: Tensor) -> None:
        self.total += cosine.sum().to(self.total)
        self.pictures += len(cosine)

    def compute(self) -> Tensor:
        return self.total / self.pictures


class CLIPTextScore(_CLIPScore):
    """Mean cosine between pictures and their texts, in -1..1 (papers often multiply by 100).

    Args:
        encoders: encoders or the folder of some.
    """

    def update(self, images: Tensor, texts: list[str]) -> None:
        """images: B 3 H W in [-1, 1]; videos B F 3 H W are scored frame by frame. texts: B."""
        encoders = self._load().to(images.device)
        text = encoders.embed_text(texts)
        if images.dim() == 5:
            text, images = text.repeat_interleave(images.shape[1], 0), images.flatten(0, 1)
        self._add((encoders.embed_image(images) * text).sum(-1))


class CLIPStyleScore(_CLIPScore):
    """Mean cosine between pictures and their style references, in -1..1.

    Args:
        encoders: encoders or the folder of some.
    """

    def update(self, images: Tensor, references: Tensor) -> None:
        """images: B 3 H W in [-1, 1], or videos B F 3 H W, scored frame by frame; references: B 3 H W."""
        encoders = self._load().to(images.device)
        reference = encoders.embed_image(references)
        if images.dim() == 5:
            reference, images = reference.repeat_interleave(images.shape[1], 0), images.flatten(0, 1)
        self._add((encoders.embed_image(images) * reference).sum(-1))
