"""Trains the autoencoder of the bundled base on rendered scenes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_gen.callbacks.samples import contact_sheet
from lit_gen.methods.base import Optimizer
from lit_gen.pretrain.architecture import build_autoencoder
from lit_gen.pretrain.part import BasePart


class Autoencoder(BasePart):
    """KL autoencoder, 64 x 64 x 3 pictures to 16 x 16 x 8 latents, trained for reconstruction.

    Args:
        widths: channels at each resolution.
        kl_weight: weight of the KL term per latent value against the squared error per pixel value.
        l1_weight: weight of the absolute error, which keeps edges crisp.
        export: folder of the base the result is written to; null writes nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        widths: list[int] = [64, 128, 128],  # noqa: B006 (read by jsonargparse, never changed)
        kl_weight: float = 1e-5,
        l1_weight: float = 0.05,
        export: str | None = None,
        optimizer: Optimizer = Optimizer(lr=1e-3, warmup_steps=200, schedule="cosine"),
    ) -> None:
        super().__init__(export, optimizer)
        self.kl_weight, self.l1_weight = kl_weight, l1_weight
        self.register_buffer("latent_std", torch.ones(()))  # as last measured; a resumed run may end without measuring
        self.vae = build_autoencoder(tuple(widths)).to(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image = batch["image"].to(memory_format=torch.channels_last)
        latent = self.vae.encode(image).latent_dist
        error = self.vae.decode(latent.sample()).sample.float() - image
        kl = 0.5 * (latent.mean.float().square() + latent.var.float() - 1 - latent.logvar.float()).mean()
        loss = error.square().mean() + self.l1_weight * error.abs().mean() + self.kl_weight * kl
        self.log_dict({"train/loss": loss, "train/kl": kl})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        latent = self.vae.encode(image).latent_dist
        restored = self.vae.decode(latent.mean).sample.float().clamp(-1, 1)
        psnr = -10 * torch.log10((restored - image).square().mean((1, 2, 3)) / 4)
        photo = batch["scenes"].style == 0
        self.log("val/psnr", psnr.mean(), batch_size=len(psnr), sync_dist=True)
        self.log("val/psnr_photo", psnr[photo].mean(), batch_size=int(photo.sum()), sync_dist=True)
        self.log("val/latent_std", latent.mean.float().std(), batch_size=len(psnr), sync_dist=True)
        if batch_idx == 0:
            self._shown = torch.stack([image[:8], restored[:8]])

    def on_validation_end(self) -> None:
        self.latent_std.copy_(self.trainer.callback_metrics["val/latent_std"])

    def preview(self) -> dict[str, Tensor]:
        """Originals above what the autoencoder makes of them."""
        return {"original and restored": contact_sheet(self._shown)}

    def parts(self) -> dict[str, Any]:
        # diffusion models expect latents of unit variance
        self.vae.register_to_config(scaling_factor=round(1 / float(self.latent_std), 5))
        return {"vae": self.vae}
