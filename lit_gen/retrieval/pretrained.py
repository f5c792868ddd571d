"""Pretrained vision and text encoders from local folders, with what CLIP projects their outputs by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertModel,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from lit_gen.errors import UserError

_SAFE = {"use_safetensors": True, "attn_implementation": "sdpa"}


def _load(cls: Any, folder: str | None, what: str) -> nn.Module:
    if not folder:
        raise UserError(f"no {what} encoder: name its folder with model.init_args.{what}, or its size with `untrained`")
    try:
        with _quiet():  # about the weights of a folder's other parts
            return cls.from_pretrained(folder, **_SAFE)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no {what} encoder that can be read: {str(error).splitlines()[0]}") from None


def load_vision(folder: str | None) -> tuple[nn.Module, Tensor | None]:
    """A CLIP vision model and, where its folder has one, the projection of its class token to the texts' space."""
    try:
        config = AutoConfig.from_pretrained(folder) if folder else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no vision encoder that can be read: {str(error).splitlines()[0]}") from None
    joint = config is not None and config.model_type == "clip"
    if joint or "CLIPVisionModelWithProjection" in (getattr(config, "architectures", None) or []):
        whole = _load(CLIPModel if joint else CLIPVisionModelWithProjection, folder, "vision")
        return _load(CLIPVisionModel, folder, "vision"), whole.visual_projection.weight.detach().clone()
    return _load(CLIPVisionModel, folder, "vision"), None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_text(folder: str | None) -> nn.Module:
    """A text encoder: CLIP's, BERT without its pooler, or whatever transformers makes of the folder."""
    try:
        kind = AutoConfig.from_pretrained(folder).model_type if folder else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no text encoder that can be read: {str(error).splitlines()[0]}") from None
    if kind in ("clip", "clip_text_model"):
        return _load(CLIPTextModel, folder, "text")
    return _load(BertWithoutPooler if kind == "bert" else AutoModel, folder, "text")


def text_projection(folder: str | None, model: nn.Module, width: int) -> Tensor | None:
    """What a CLIP text model's states are projected by; a model without a projection was trained with its states."""
    if not isinstance(model, CLIPTextModel):
        return None
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "clip":
        return _load(CLIPModel, folder, "text").text_projection.weight.detach().clone()
    if "CLIPTextModelWithProjection" in (config.architectures or []):
        return _load(CLIPTextModelWithProjection, folder, "text").text_projection.weight.detach().clone()
    return torch.eye(width)


class BertWithoutPooler:
    """BERT without the pooling layer, whose weights a contrastive loss would not train."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> BertModel:
        return BertModel.from_pretrained(folder, add_pooling_layer=False, **options)


def normalisation(folder: str | None) -> tuple[list[float], list[float]]:
    """Mean and deviation of a vision model's input, from beside its weights or its base's feature extractor."""
    places = [Path(folder), Path(folder).parent / "feature_extractor"] if folder else []
    for place in places:
        if (file := place / "preprocessor_config.json").is_file():
            said = json.loads(file.read_text())
            return said.get("image_mean", OPENAI_CLIP_MEAN), said.get("image_std", OPENAI_CLIP_STD)
    return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
