"""Frames and texts to features: pretrained encoders by path, pooled over time, optionally with LoRA.

Letters: B videos or texts, F frames, L tokens, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from lit_gen.errors import UserError
from lit_gen.retrieval.pretrained import load_text, load_vision, normalisation, text_projection

_ALIKE = 32  # texts of about the same length encoded together on a CPU
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value")


@dataclass
class Size:
    """A tower with random weights, instead of one from a folder.

    Args:
        width: of its states.
        layers: transformer blocks.
        heads: attention heads.
        image_size: (frames) pixels.
        patch_size: (frames) pixels.
        vocabulary: (text) tokens.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    vocabulary: int = 30522


@dataclass
class LoRA:
    """Low-rank adapters on a tower's attention; the tower itself is then frozen.

    Args:
        rank: of the adapters.
        alpha: their output is scaled by alpha / rank.
        dropout: of their input.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0


@dataclass
class VideoTower:
    """How frames become a video's feature.

    Args:
        frozen: keep the frame encoder as it is; what it gives can then be cached.
        lora: adapters on the frame encoder.
        cells: beside the class token, also the means of the patches in cells x cells parts of the frame, which tell
            where things are; 0 for the class token alone, as in COSA.
        pooling: "mean" over frames, as in COSA, or a "transformer" over them before the mean.
        width: of the transformer.
        layers: of the transformer.
        heads: of the transformer.
        dropout: in the transformer.
        checkpointing: compute activations of the frame encoder again in the backward pass, to save memory.
        frames_at_once: frames encoded together, which bounds memory where nothing is trained; 0 for all.
        untrained: a frame encoder with random weights, in place of one from a folder.
    """

    frozen: bool = True
    lora: LoRA | None = None
    cells: int = 0
    pooling: Literal["mean", "transformer"] = "transformer"
    width: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    checkpointing: bool = False
    frames_at_once: int = 0
    untrained: Size | None = None


@dataclass
class TextTower:
    """How texts become features.

    Args:
        frozen: keep the text encoder as it is.
        lora: adapters on the text encoder.
        max_tokens: longer texts are cut; an encoder with fewer positions is given more of them. By default as many as
            the encoder has.
        untrained: a BERT with random weights, in place of an encoder from a folder.
    """

    frozen: bool = False
    lora: LoRA | None = None
    max_tokens: int | None = None
    untrained: Size | None = None


class FrameEncoder(nn.Module):
    """Frames to a feature each: the class token of a CLIP vision model, and means of parts of the frame."""

    depends = ("cells", "normalisation")  # what a feature depends on beside the weights

    def __init__(self, folder: str | None, settings: VideoTower) -> None:
        super().__init__()
        self.cells, self.at_once = settings.cells, settings.frames_at_once
        if settings.untrained is not None:
            u = settings.untrained
            sizes = {"hidden_size": u.width, "intermediate_size": 4 * u.width, "num_hidden_layers": u.layers}
            shape = {"num_attention_heads": u.heads, "image_size": u.image_size, "patch_size": u.patch_size}
            self.vision = CLIPVisionModel(CLIPVisionConfig(**sizes, **shape, attn_implementation="sdpa"))
            self.projection = None
        else:
            self.vision, self.projection = load_vision(folder)
        config = self.vision.config
        self.size, self.grid = config.image_size, config.image_size // config.patch_size
        if self.cells and self.grid % self.cells:
            raise UserError(f"video.cells is {self.cells}, which does not divide the {self.grid} patches of a row")
        self.width = config.hidden_size * (1 + self.cells**2)
        self.normalisation = mean, std = normalisation(folder)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.frozen = _set_trainable(self.vision, settings.frozen, settings.lora)
        if settings.checkpointing:
            self.vision.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, frames: Tensor) -> Tensor:
        """frames: N 3 H W, bytes or in [-1, 1]; returns N D."""
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            parts = frames.split(self.at_once) if self.at_once else [frames]
            return torch.cat([self._encode(part) for part in parts])

    def _encode(self, frames: Tensor) -> Tensor:
        if frames.dtype == torch.uint8:  # as `images.to_tensor` does it
            frames = frames.contiguous().float().div_(127.5).sub_(1)
        if frames.shape[-2:] != (self.size, self.size):
            frames = F.interpolate(frames, (self.size, self.size), mode="bicubic", antialias=True)
        pixels = ((frames + 1) / 2 - self.mean) / self.std
        output = self.vision(pixel_values=pixels.to(self.vision.dtype))
        found = [output.pooler_output]
        if self.cells:
            patches = output.last_hidden_state[:, 1:].unflatten(1, (self.grid, self.grid)).movedim(-1, 1)  # N D h w
            found.append(F.adaptive_avg_pool2d(patches, self.cells).flatten(1))
        return torch.cat(found, 1)

    def train(self, mode: bool = True) -> FrameEncoder:
        return super().train(mode and not self.frozen)


class VideoHead(nn.Module):
    """theta_v: features of a video's frames, B F D, to the shared space, B W.

    Args:
        pooling: over time.
        aligned: a pretrained image-text model's projection of a frame's class token, W D'. The head then starts as the
            mean of what that model says of each frame, and what else the pooling finds is added to it from nothing.
    """

    def __init__(self, pooling: TemporalPooling, width: int, aligned: Tensor | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.project = nn.Linear(pooling.width, width, bias=False)
        self.each: nn.Linear | None = None
        if aligned is not None:
            nn.init.zeros_(self.project.weight)
            self.each = nn.Linear(aligned.shape[1], width, bias=False)
            self.each.weight.data.copy_(aligned)

    def forward(self, features: Tensor) -> Tensor:
        found = self.project(self.pooling(features))
        return found if self.each is None else found + self.each(features[..., : self.each.in_features].mean(1))


class TemporalPooling(nn.Module):
    """Features of a video's frames to one: B F D to B W."""

    def __init__(self, frame_width: int, settings: VideoTower) -> None:
        super().__init__()
        self.blocks: nn.Module | None = None
        self.width = frame_width
        if settings.pooling == "transformer":
            self.width = width = settings.width
            self.normal, self.project = nn.LayerNorm(frame_width), nn.Linear(frame_width, width)
            layer = nn.TransformerEncoderLayer(
                width, settings.heads, 4 * width, settings.dropout, "gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, features: Tensor) -> Tensor:
        if self.blocks is None:
            return features.mean(1)
        x = self.project(self.normal(features))
        return self.blocks(x + _positions(x.shape[1], self.width).to(x)).mean(1)


class TextEncoder(nn.Module):
    """Texts to the state of the token that stands for all of them: CLIP's end token, the first of other encoders."""

    def __init__(self, folder: str | None, tokenizer: str | None, settings: TextTower) -> None:
        super().__init__()
        place = tokenizer or folder
        if place is None:
            raise UserError("the text encoder needs a tokenizer: name its folder with model.init_args.tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise UserError(f"{place}: no tokenizer that can be read: {str(error).splitlines()[0]}") from None
        if settings.untrained is not None:
            u, tokens = settings.untrained, settings.max_tokens or 512
            sizes = {"hidden_size": u.width, "intermediate_size": 4 * u.width, "num_hidden_layers": u.layers}
            more = {"num_attention_heads": u.heads, "max_position_embeddings": tokens}
            vocabulary = max(u.vocabulary, len(self.tokenizer))
            self.model = BertModel(BertConfig(vocab_size=vocabulary, **sizes, **more), add_pooling_layer=False)
        else:
            self.model = load_text(folder)
        table = _position_table(self.model)
        self.max_tokens = settings.max_tokens or len(table.weight)
        if self.max_tokens > len(table.weight):
            _lengthen(self.model, self.max_tokens)
        self.width = self.model.config.hidden_size
        self.projection = text_projection(folder, self.model, self.width) if settings.untrained is None else None
        self.frozen = _set_trainable(self.model, settings.frozen, settings.lora)
        self.tokenizer.model_max_length = 1 << 20  # texts are cut here, and counted

    def cuts(self, text: str) -> bool:
        """Whether only the beginning of a text is read."""
        return len(self.tokenizer(text).input_ids) > self.max_tokens

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask of texts: B L each, L that of the longest one, long texts cut."""
        rows = self.tokenizer(texts).input_ids
        # the last token is special: it stays last, as truncation by the tokenizer itself would leave it
        rows = [row if len(row) <= self.max_tokens else [*row[: self.max_tokens - 1], row[-1]] for row in rows]
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, texts: list[str]) -> Tensor:
        """B D of B texts."""
        device = next(self.model.parameters()).device
        if device.type == "cpu" and len(texts) > _ALIKE:  # which pays for padding; a GPU has it for nothing
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            parts = [order[i : i + _ALIKE] for i in range(0, len(order), _ALIKE)]
            found = torch.cat([self._encode([texts[i] for i in part], device) for part in parts])
            return found[torch.tensor(order).argsort()]
        return self._encode(texts, device)

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        tokens = {name: value.to(device) for name, value in self.tokens(texts).items()}
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            output = self.model(**tokens)
        return output.pooler_output if isinstance(self.model, CLIPTextModel) else output.last_hidden_state[:, 0]

    def train(self, mode: bool = True) -> TextEncoder:
        return super().train(mode and not self.frozen)


def _set_trainable(model: nn.Module, frozen: bool, lora: LoRA | None) -> bool:
    """Freeze a model, or give it adapters; returns whether nothing of it trains."""
    if lora is None:
        model.requires_grad_(not frozen)
        return frozen
    from peft import LoraConfig, inject_adapter_in_model

    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(present & set(_LORA_TARGETS))
    if not targets:
        raise UserError(
            f"{type(model).__name__} has no attention that LoRA is known to fit ({', '.join(_LORA_TARGETS)})"
        )
    model.requires_grad_(False)
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    inject_adapter_in_model(settings, model)
    return False


def _position_table(model: nn.Module) -> nn.Embedding:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in (
            "position_embedding",
            "position_embeddings",
        ):
            return module
    raise UserError(f"{type(model).__name__} has no table of positions, so its length is not known")


def _lengthen(model: nn.Module, length: int) -> None:
    """More positions: the known ones stay, those beyond start as the last one."""
    table = _position_table(model)
    old = table.weight.data
    table.weight = nn.Parameter(torch.cat([old, old[-1:].expand(length - len(old), -1)]))
    table.num_embeddings = length
    for module in model.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            if name == "position_ids":
                module.register_buffer(name, torch.arange(length)[None], persistent=False)
            elif name == "token_type_ids":
                module.register_buffer(name, torch.zeros(1, length, dtype=torch.long), persistent=False)
    model.config.max_position_embeddings = length


def _positions(frames: int, width: int) -> Tensor:
    """Sines and cosines of the place in the video, F W, so that any number of frames has places."""
    place = torch.linspace(0, 1, frames)[:, None] * 60 if frames > 1 else torch.zeros(1, 1)
    rate = torch.exp(-torch.arange(0, width, 2) * (torch.log(torch.tensor(1000.0)) / width))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], 1)[:, :width]
