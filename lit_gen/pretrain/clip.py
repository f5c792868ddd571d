"""Trains the text and image encoders of the bundled base on rendered scenes and their captions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lit_gen.methods.base import Optimizer
from lit_gen.pretrain.architecture import build_clip
from lit_gen.pretrain.part import BasePart


class CLIP(BasePart):
    """Contrastive language-image training (Radford et al. 2021) with a self-supervised term on the images.

    The term is SLIP's (Mu et al. 2022): two crops of a picture must find each other, so that the image tower also keeps
    what captions leave unsaid, above all the unnamed styles.

    Args:
        tokenizer: folder of the tokenizer.
        width: of the text tower and of the shared space.
        vision_width: of the image tower.
        layers: of the text tower; the image tower has one more.
        crop_weight: weight of the self-supervised term.
        twin_weight: weight of telling a caption from its twin, where the data has twins (`RenderedWorld(twins=True)`).
        smallest_crop: side of the smallest crop as a fraction of the picture.
        export: folder of the base the result is written to; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        tokenizer: str,
        width: int = 128,
        vision_width: int = 192,
        layers: int = 4,
        crop_weight: float = 0.3,
        twin_weight: float = 1.0,
        smallest_crop: float = 0.6,
        export: str | None = None,
        optimizer: Optimizer = Optimizer(
            lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup_steps=300, schedule="cosine"
        ),
    ) -> None:
        super().__init__(export, optimizer)
        words = CLIPTokenizer.from_pretrained(tokenizer)
        self.clip = build_clip(len(words), words.model_max_length, words.eos_token_id, width, vision_width, layers)
        self.crop_head = nn.Sequential(nn.Linear(vision_width, 256), nn.GELU(), nn.Linear(256, 128))
        self.crop_weight, self.twin_weight, self.smallest_crop = crop_weight, twin_weight, smallest_crop

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit embeddings B D of token ids B L."""
        return F.normalize(self.clip.text_model(input_ids=tokens).pooler_output.float(), dim=-1)

    def embed_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings B D of images B 3 H W, and the class token B D' they were projected from."""
        pooled = self.clip.vision_model(pixel_values=normalise(image)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1), pooled

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        text = self.embed_text(batch["tokens"])
        image, pooled = self.embed_image(batch["image"])
        scale = self.clip.logit_scale.exp().clamp(max=100)
        language = contrast(text, image, scale)
        if "twin_tokens" in batch:
            # against the caption that is wrong in one fact, and only against it: a batch holds few such pairs
            wrong = (self.embed_text(batch["twin_tokens"]) * image).sum(-1)
            same = (batch["twin_tokens"] == batch["tokens"]).all(-1)
            margin = F.softplus(scale * (wrong - (text * image).sum(-1)))
            twins = (margin * ~same).sum() / (~same).sum().clamp(min=1)
            self.log("train/twins", twins)
            language = language + self.twin_weight * twins
        _, cropped = self.embed_image(random_crops(batch["image"], self.smallest_crop))
        views = [F.normalize(self.crop_head(p).float(), dim=-1) for p in (pooled, cropped)]
        crops = contrast(*views, scale=10.0)
        self.log_dict({"train/language": language, "train/crops": crops, "train/scale": scale.detach()})
        return language + self.crop_weight * crops

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits = self.embed_text(batch["tokens"]) @ self.embed_image(batch["image"])[0].T
        hit = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        self.log("val/recall_at_1", hit, batch_size=len(logits), sync_dist=True)
        if "twin_tokens" in batch:
            wrong = (self.embed_text(batch["twin_tokens"]) * self.embed_image(batch["image"])[0]).sum(-1)
            told = (logits.diagonal() > wrong)[(batch["twin_tokens"] != batch["tokens"]).any(-1)].float().mean()
            self.log("val/told_from_twin", told, batch_size=len(logits), sync_dist=True)

    def parts(self) -> dict[str, Any]:
        return {"clip": self.clip}


def normalise(image: Tensor) -> Tensor:
    """Pictures in -1..1 to the mean and deviation of CLIP."""
    mean = image.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = image.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return ((image + 1) / 2 - mean) / std


def contrast(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy between unit embeddings B D whose rows belong together."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def random_crops(image: Tensor, smallest: float) -> Tensor:
    """A square crop of each picture B 3 H W with a side between `smallest` and 1, at the original size."""
    side = smallest + (1 - smallest) * torch.rand(len(image), device=image.device)
    centre = (2 * torch.rand(len(image), 2, device=image.device) - 1) * (1 - side)[:, None]
    affine = torch.zeros(len(image), 2, 3, device=image.device)
    affine[:, 0, 0] = affine[:, 1, 1] = side
    affine[:, :, 2] = centre
    grid = F.affine_grid(affine, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
