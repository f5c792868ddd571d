"""Trains the motion modules of the bundled base on clips of unstyled moving scenes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import ddim, guided, noise_from
from lit_gen.diffusion.temporal import motion_modules, motion_unet
from lit_gen.methods.base import Optimizer
from lit_gen.pretrain.architecture import FRAMES, LATENT_CHANNELS, LATENT_SIZE, build_motion_adapter, build_scheduler
from lit_gen.pretrain.part import BasePart
from lit_gen.pretrain.text_to_image import Text, noise_error


class Motion(BasePart):
    """AnimateDiff (Guo et al. 2023): temporal layers trained between the frozen layers of a text-to-image model.

    Single pictures do not show whether a thing spins or which way it goes, so a text-to-image model's layers need not
    tell such words apart, and then the temporal layers cannot. With `spatial_lr` its layers and its text encoder learn
    along, from clips and pictures in every step: batches are then {"clips": ..., "pictures": ...}.

    Args:
        base: folder whose tokenizer, text_encoder, vae and unet are used.
        heads: of the temporal attention.
        drop_text: share of training clips whose caption is replaced by the empty one.
        min_snr: gamma of the min-SNR loss weight; null for none.
        lowest_snr: the least of that weight.
        spatial_lr: learning rate of the spatial layers; null keeps them and the text encoder frozen. The encoder has
            that of the motion modules: its states of "moves left" and "moves right" are 3 % apart at first.
        contrast_weight: weight of the contrastive loss of a tuned text encoder, see TextToImage.
        apart: pairs of words that start anew as different ones: their embeddings are set apart.
        compile: compile the network with torch.compile.
        guidance: classifier-free guidance scale of the clips drawn after validation.
        sample_steps: DDIM steps of the clips drawn after validation; 0 draws none.
        export: folder of the base the result is written to; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str,
        heads: int = 4,
        drop_text: float = 0.1,
        min_snr: float | None = 5.0,
        lowest_snr: float = 0.0,
        spatial_lr: float | None = None,
        contrast_weight: float = 0.05,
        apart: list[list[str]] | None = None,
        compile: bool = False,
        guidance: float = 4.0,
        sample_steps: int = 25,
        export: str | None = None,
        optimizer: Optimizer = Optimizer(lr=1e-3, warmup_steps=300, schedule="cosine"),
    ) -> None:
        super().__init__(export, optimizer)
        self.heads = heads
        tuned = spatial_lr is not None
        self.text = Text(base, frozen=not tuned, apart=apart or ())
        self.autoencoder = load_base(base, parts=["vae"])
        pictures = load_base(base, parts=["unet"]).unet
        self.unet = motion_unet(pictures, build_motion_adapter(pictures, heads))
        for modules in [self.unet] if tuned else motion_modules(self.unet):
            modules.requires_grad_(True)
        self.__dict__["picture_unet"] = pictures  # whose layers are those of `unet`: stored once
        self.schedule = Schedule(build_scheduler())
        self.drop_text, self.min_snr, self.lowest_snr, self.compile_network = drop_text, min_snr, lowest_snr, compile
        self.spatial_lr, self.contrast_weight = spatial_lr, contrast_weight
        self.guidance, self.sample_steps = guidance, sample_steps

    def configure_model(self) -> None:
        if self.compile_network:
            self.unet.compile()
            self.picture_unet.compile()
            self.compile_network = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.spatial_lr is None:
            return super().parameter_groups()
        new = [p for modules in motion_modules(self.unet) for p in modules.parameters()]
        new += self.text.parameters()
        known = {id(p) for p in new}
        spatial = [p for p in self.trainable_parameters() if id(p) not in known]
        return [{"params": new}, {"params": spatial, "lr": self.spatial_lr}]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch.get("clips", batch))
        self.log("train/loss", loss)
        if self.spatial_lr is not None:
            pictures, language = self.picture_loss(batch["pictures"]), self.text.contrast(batch["pictures"])
            self.log_dict({"train/loss on pictures": pictures, "train/language": language})
            loss = loss + pictures + self.contrast_weight * language
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Weighted noise prediction error of clips B F C h w under captions B L."""
        how = (self.drop_text, self.min_snr, self.lowest_snr)
        return noise_error(self.predict_noise, self.schedule, self.text, batch, *how)

    def picture_loss(self, batch: dict[str, Any]) -> Tensor:
        """The same of pictures B C h w, past the temporal layers."""
        how = (self.drop_text, self.min_snr, self.lowest_snr)
        return noise_error(lambda *x: self.picture_unet(*x).sample, self.schedule, self.text, batch, *how)

    def predict_noise(self, noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Noise B F C h w in clips B F C h w; the network wants channels before frames and text once a frame."""
        states = states.repeat_interleave(noisy.shape[1], dim=0)
        # validation goes round the compiled call, which would be compiled again for every other batch size
        network = self.unet if self.training else self.unet.forward
        return network(noisy.transpose(1, 2), t, states).sample.transpose(1, 2)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch["tokens"]), sync_dist=True)
        if batch_idx == 0:
            self._shown = batch["tokens"][:8]

    def preview(self) -> dict[str, Tensor]:
        """Clips of the first validation prompts, as films and as strips."""
        if not self.sample_steps:
            return {}
        clips = self.draw(self._shown)
        return {"clips": contact_sheet([clips]), "strips": contact_sheet(clips)}

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        """Clips B F 3 H W in -1..1 for captions B L."""

        def predict(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.predict_noise(x, t, states).float()

        denoise = guided(predict, self.text(self.text.null(tokens)), self.text(tokens), self.guidance)
        noise = noise_from(list(range(len(tokens))), (FRAMES, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), self.device)
        latent = ddim(denoise, self.schedule, noise, self.sample_steps)
        return self.autoencoder.decode(latent.flatten(0, 1)).unflatten(0, latent.shape[:2])

    def parts(self) -> dict[str, Any]:
        weights = {n: w for n, w in self.unet.state_dict().items() if "motion_modules" in n}
        adapter = build_motion_adapter(self.unet, self.heads)
        adapter.load_state_dict(weights)
        if self.spatial_lr is None:
            return {"motion_adapter": adapter}
        return {"motion_adapter": adapter, "unet": self.picture_unet, "text_encoder": self.text.encoder}
