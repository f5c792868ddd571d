"""Trains the text-to-image network of the bundled base on latents of rendered scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import ddim, guided, noise_from
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.pretrain.architecture import LATENT_CHANNELS, LATENT_SIZE, build_scheduler, build_unet
from lit_gen.pretrain.clip import contrast
from lit_gen.pretrain.part import BasePart

_CONTRAST_SCALE = 30.0  # of the cosines in the contrastive loss, about where CLIP's own scale ends


class TextToImage(BasePart):
    """Latent diffusion (Rombach et al. 2022): predicts the noise in latents from text states.

    The text encoder is frozen, or tuned along: contrastive training alone leaves captions that differ in what a picture
    hardly shows (left and right, moves left and moves right) with nearly the same states. Its embeddings are then held
    in the space of the image encoder by the contrastive loss against that encoder, frozen (as in LiT, Zhai et al.
    2022), which takes a data module with `clip`.

    Args:
        base: folder whose tokenizer, text_encoder and vae are used.
        widths: channels at each resolution.
        layers: residual blocks per resolution.
        drop_text: share of training samples whose caption is replaced by the empty one, for classifier-free guidance.
        min_snr: gamma of the min-SNR loss weight (Hang et al. 2023); null for none.
        lowest_snr: the least of that weight.
        text_lr: learning rate of the text encoder; null keeps it frozen.
        contrast_weight: weight of the contrastive loss that goes with a tuned text encoder.
        compile: compile the network with torch.compile (worth it on a GPU for more than a few hundred steps).
        guidance: classifier-free guidance scale of the pictures drawn after validation.
        sample_steps: DDIM steps of the pictures drawn after validation; 0 draws none.
        export: folder of the base the result is written to; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str,
        widths: list[int] = [96, 160],  # noqa: B006 (read by jsonargparse, never changed)
        layers: int = 1,
        drop_text: float = 0.1,
        min_snr: float | None = 5.0,
        lowest_snr: float = 0.0,
        text_lr: float | None = None,
        contrast_weight: float = 0.05,
        compile: bool = False,
        guidance: float = 4.0,
        sample_steps: int = 25,
        export: str | None = None,
        optimizer: Optimizer = Optimizer(lr=1e-3, warmup_steps=500, schedule="cosine"),
    ) -> None:
        super().__init__(export, optimizer)
        self.text = Text(base, frozen=text_lr is None)
        self.autoencoder = load_base(base, parts=["vae"])
        self.unet = build_unet(tuple(widths), layers, self.text.width).to(memory_format=torch.channels_last)
        self.schedule = Schedule(build_scheduler())
        self.drop_text, self.min_snr, self.lowest_snr, self.compile_network = drop_text, min_snr, lowest_snr, compile
        self.text_lr, self.contrast_weight = text_lr, contrast_weight
        self.guidance, self.sample_steps = guidance, sample_steps

    def configure_model(self) -> None:
        if self.compile_network:
            self.unet.compile()
            self.compile_network = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.text_lr is None:
            return super().parameter_groups()
        return [{"params": [*self.unet.parameters()]}, {"params": [*self.text.parameters()], "lr": self.text_lr}]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        if self.text_lr is not None:
            language = self.text.contrast(batch)
            self.log("train/language", language)
            loss = loss + self.contrast_weight * language
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Weighted noise prediction error of latents B C h w under captions B L."""
        # validation goes round the compiled call, which would be compiled again for every other batch size
        network = self.unet if self.training else self.unet.forward

        def predict(noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return network(noisy.to(memory_format=torch.channels_last), t, states).sample

        return noise_error(predict, self.schedule, self.text, batch, self.drop_text, self.min_snr, self.lowest_snr)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch["tokens"]), sync_dist=True)
        if batch_idx == 0:
            self._shown = batch["tokens"][:32]

    def preview(self) -> dict[str, Tensor]:
        """Pictures of the first validation prompts."""
        if not self.sample_steps:
            return {}
        return {"pictures": contact_sheet(self.draw(self._shown).split(8))}

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 for captions B L."""

        def predict(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.unet.forward(x, t, states).sample.float()  # not the compiled call: other sizes

        denoise = guided(predict, self.text(self.text.null(tokens)), self.text(tokens), self.guidance)
        shape = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        noise = noise_from(list(range(len(tokens))), shape, self.device)
        return self.autoencoder.decode(ddim(denoise, self.schedule, noise, self.sample_steps))

    def parts(self) -> dict[str, Any]:
        parts = {"unet": self.unet, "scheduler": build_scheduler()}
        return parts if self.text_lr is None else parts | {"text_encoder": self.text.encoder}


def noise_error(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    text: Text,
    batch: dict[str, Any],
    drop_text: float,
    min_snr: float | None,
    lowest_snr: float,
) -> Tensor:
    """Mean weighted error of what `predict` gives for noisy latents, timesteps and text states.

    batch: "latent" B ... and "tokens" B L, of which a share `drop_text` is replaced by the empty caption.
    """
    clean = batch["latent"].float()
    states = text(text.drop(batch["tokens"], drop_text))
    t = schedule.sample_timesteps(len(clean), clean.device)
    noise = torch.randn_like(clean)
    output = predict(schedule.add_noise(clean, noise, t), t, states)
    return schedule.loss(output, clean, noise, t, min_snr, lowest_snr).mean()


@torch.no_grad()
def set_apart(embeddings: Tensor, first: int, second: int) -> None:
    """Make two rows of embeddings N D orthogonal, in place: their mean stays, their difference grows to its length.

    Two words that training never told apart end as one, and stay so: what a network could do with their difference, and
    what the difference could gain from that, are both too small to grow.
    """
    mean, half = (embeddings[first] + embeddings[second]) / 2, (embeddings[first] - embeddings[second]) / 2
    half = half * (mean.norm() / half.norm())
    embeddings[first], embeddings[second] = mean + half, mean - half


class Text(torch.nn.Module):
    """Text states of token ids, from a base's text encoder.

    Args:
        base: folder with tokenizer/ and text_encoder/.
        frozen: whether the encoder takes no gradients.
        apart: pairs of words whose embeddings are set apart first, see `set_apart`.

    Raises:
        UserError: a word to be set apart is not one token.
    """

    def __init__(self, base: str, frozen: bool = True, apart: Sequence[Sequence[str]] = ()) -> None:
        super().__init__()
        parts = load_base(base, parts=["tokenizer", "text_encoder"])
        tokenizer: CLIPTokenizer = parts.tokenizer
        self.encoder: CLIPTextModel = parts.text_encoder.requires_grad_(not frozen)
        self.width: int = self.encoder.config.hidden_size
        null = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
        self.register_buffer("null_tokens", null, persistent=False)
        for pair in apart:
            tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in pair]
            if len(pair) != 2 or any(len(token) != 1 or token == [tokenizer.unk_token_id] for token in tokens):
                raise UserError(f"model.apart has {list(pair)}, which is not two words of one token each in {base}")
            set_apart(self.encoder.get_input_embeddings().weight, tokens[0][0], tokens[1][0])

    def null(self, tokens: Tensor) -> Tensor:
        """The empty caption, as many times as there are captions B L."""
        return self.null_tokens.expand_as(tokens)

    def drop(self, tokens: Tensor, share: float) -> Tensor:
        """Captions B L, each replaced by the empty one with probability `share`."""
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < share
        return torch.where(dropped, self.null(tokens), tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """States B L D of captions B L."""
        return self.encoder(input_ids=tokens).last_hidden_state

    def embed(self, tokens: Tensor) -> Tensor:
        """Unit embeddings B D of captions B L."""
        return F.normalize(self.encoder(input_ids=tokens).pooler_output.float(), dim=-1)

    def contrast(self, batch: dict[str, Any]) -> Tensor:
        """Contrastive loss of the captions "tokens" B L against "image_embedding" B D."""
        return contrast(self.embed(batch["tokens"]), batch["image_embedding"], scale=_CONTRAST_SCALE)
