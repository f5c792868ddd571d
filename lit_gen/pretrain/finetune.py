"""Finetunes all of a text-to-image network on cached latents and text states, as fast as the device can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gen.diffusion.base import Base, load_base, precision_of
from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.layout import keep_channels_last
from lit_gen.diffusion.objective import Schedule
from lit_gen.errors import UserError
from lit_gen.methods.base import Method, Optimizer
from lit_gen.pretrain.architecture import build_scheduler

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class Network:
    """A UNet in the manner of Stable Diffusion 1.x, whose sizes are the defaults.

    Args:
        widths: channels at each resolution; all but the last have cross-attention.
        layers: residual blocks per resolution on the way down.
        heads: of every attention.
        text_width: width of the text states.
        channels: of the latents.
        latent_size: height and width of the latents.
    """

    widths: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    layers: int = 2
    heads: int = 8
    text_width: int = 768
    channels: int = 4
    latent_size: int = 64

    def build(self) -> UNet2DConditionModel:
        n = len(self.widths) - 1
        return UNet2DConditionModel(
            sample_size=self.latent_size,
            in_channels=self.channels,
            out_channels=self.channels,
            down_block_types=("CrossAttnDownBlock2D",) * n + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * n,
            block_out_channels=tuple(self.widths),
            layers_per_block=self.layers,
            attention_head_dim=self.heads,  # as diffusers names the number of heads
            cross_attention_dim=self.text_width,
            norm_num_groups=min(32, min(self.widths)),
        )


class Finetune(Method):
    """Latent diffusion (Rombach et al. 2022) on batches {"latents": B C h w, "text_states": B L D}.

    With a base also on pictures that `python -m lit_gen cache` encoded: {"posterior": B 2 C h w, "text_states": B L D}.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint whose network is trained; by default random weights.
        network: sizes of the network without a base.
        compile: compile the network; null does not.
        attention: implementations of attention, the preferred one first; null leaves the choice to torch.
        channels_last: what has its channels last, as the convolutions of GPUs prefer it: the "weights", "all" that
            goes through them too, or "none".
        checkpointing: compute activations again in the backward pass instead of keeping them: slower, less memory.
        min_snr: gamma of the min-SNR loss weight (Hang et al. 2023); null for none.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str | None = None,
        network: Network = Network(),
        compile: Compile | None = None,
        attention: list[Literal["cudnn", "flash", "efficient", "math"]] | None = None,
        channels_last: Literal["none", "weights", "all"] = "all",
        checkpointing: bool = False,
        min_snr: float | None = None,
        optimizer: Optimizer = Optimizer(lr=1e-5),
    ) -> None:
        super().__init__(optimizer)
        self.base_path = base
        self.compiled, self.attention, self.channels_last, self.min_snr = compile, attention, channels_last, min_snr
        if base is None:
            self.unet, scheduler = network.build(), build_scheduler()
        else:
            parts = load_base(base, parts=["unet", "scheduler"])
            self.unet, scheduler = parts.unet.requires_grad_(True).train(), parts.scheduler
        self.schedule = Schedule(scheduler)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    def configure_model(self) -> None:
        if self.channels_last == "weights":
            self.unet.to(memory_format=torch.channels_last)
        elif self.channels_last == "all":
            keep_channels_last(self.unet)
        if self.compiled is not None:
            self.compiled.apply(self.unet)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=len(batch["text_states"]))
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Noise prediction error, averaged over the batch."""
        clean, text = self.latents(batch).float(), batch["text_states"].to(precision_of(self.unet))
        t = self.schedule.sample_timesteps(len(clean), clean.device)
        noise = torch.randn_like(clean)
        noisy = self.schedule.add_noise(clean, noise, t)
        if self.channels_last != "none":
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        if self.compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()
        with self._chosen_attention():
            output = self.unet(noisy, t, text, return_dict=False)[0]
        return self.schedule.loss(output, clean, noise, t, self.min_snr).mean()

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Scaled latents B C h w, drawn anew each time where the batch has their distributions."""
        if "posterior" in batch:
            return self.encoders.draw(batch["posterior"])
        if "latents" not in batch:
            raise UserError(
                "Finetune trains on cached latents: run `cache` with this experiment, and set data.init_args.cached"
            )
        return batch["latents"]

    @cached_property
    def encoders(self) -> Base:
        """What makes latents and text states; in nobody's parameters, since training never runs it."""
        return load_base(self.base_path, parts=["tokenizer", "text_encoder", "vae"])

    def cached_parts(self) -> dict[str, Any]:
        names = ("tokenizer", "text_encoder", "vae") if self.base_path else ()
        return {name: getattr(self.encoders, name) for name in names}

    @torch.no_grad()
    def encode_for_cache(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        states = self.encoders.text_condition(batch["caption"]).states
        return {"text_states": states, "posterior": self.encoders.posterior(batch["image"])}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep the gradients through the next forward pass, where memory is short, and where CUDA
        # graphs want theirs back.
        optimizer.zero_grad()

    def _chosen_attention(self) -> AbstractContextManager:
        if self.attention is None:
            return nullcontext()
        return sdpa_kernel([ATTENTION[name] for name in self.attention], set_priority=True)
