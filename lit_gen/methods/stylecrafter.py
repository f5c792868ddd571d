"""StyleCrafter (arXiv 2312.00330): pictures and clips of a prompt in the style of reference pictures.

Stage "adapter": on stylised pictures, learns style tokens read from a crop of the picture and a style cross-attention
beside the text's. Stage "temporal": on the same pictures and ordinary clips, finetunes only the motion modules, so that
styled clips stay steady although no styled clip was ever seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gen.data.styled import strip_style
from lit_gen.diffusion.attention import Style
from lit_gen.diffusion.compile import Compile, uncompiled
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import ddim, noise_from
from lit_gen.diffusion.style_adapter import Adapter, StyleAdapter
from lit_gen.diffusion.temporal import motion_modules, motion_unet
from lit_gen.diffusion.text import TextCondition
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.errors import UserError, at_least
from lit_gen.methods.base import Optimizer
from lit_gen.methods.stylecrafter_base import keep_frozen_in, load
from lit_gen.methods.stylecrafter_files import load_adapter, save_all, size_of
from lit_gen.methods.stylecrafter_judgement import Judgement, random_view, real_samples
from lit_gen.methods.stylecrafter_prediction import Prediction
from lit_gen.methods.stylecrafter_references import Pictures, References, read
from lit_gen.methods.stylecrafter_sampling import Sampling, guided
from lit_gen.methods.stylecrafter_weights import read_temporal


class StyleCrafter(Prediction):
    """Style adapter and temporal finetuning.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the text-to-image model; of the SDXL kind only in
            stage "adapter".
        stage: "adapter" trains the style adapter on pictures; "temporal" the motion modules on pictures and clips;
            "joint" both at once (the paper's ablation).
        motion: folder or Hub id of the motion adapter; by default `motion_adapter/` in the base's folder.
        image_encoder: folder or Hub id of the CLIP vision model; by default `image_encoder/` in the base's folder.
        config: for a single-file base, the diffusers folder with its model configs and tokenizer.
        adapter: size of the style adapter.
        adapter_weights: what it starts from: a folder that `export` wrote, which also tells its size, or a released
            file (adapter_v1.pth, stylecrafter_sdxl.ckpt), whose names and shapes do. `predict` and `export` need no
            checkpoint then; where there is one that was not trained from these, they refuse to choose.
        temporal_weights: released temporal layers (temporal_v1.pth), in the place of the base's; likewise.
        style_weight: strength of the style, lambda.
        drop_style: share of training samples that get no style. The paper tells no rate, and the released SDXL code
            drops nothing.
        drop_text: share that get the empty prompt; likewise.
        drop_both: share that get neither; likewise.
        decoupled: the reference is another view of the picture; false makes it the picture (the paper's ablation).
        timestep_bias: timesteps of pictures are drawn with a density proportional to t to this power; the paper's 0 is
            uniform, and clips always have that.
        error_of: what the squared error of pictures is of: the "noise" (or velocity) that the base predicts, as in the
            paper and always for clips; or the "clean" latent that the prediction implies. The colours of a small
            picture show through all but the strongest noise, so there the paper's loss learns little from the reference
            (ours: bias 2 and "clean" find the style in a tenth of the steps).
        style_zoom: short side of the picture a clip's reference is cropped from, in units of the clip's size; the
            paper's of pictures, as that of clips is unpublished.
        negative: the prompt of the unconditional term; SDXL's released code has "monochrome, lowres, bad anatomy, ...".
        image_sampling: how pictures are drawn.
        video_sampling: how clips are drawn; scales 15 and 7.5 are the paper's.
        oracle: folder of the oracle that scores validation samples of the world; null for data without ground truth.
        prompts: what `predict` draws; texts, or .txt files with one in each line.
        styles: what `predict` draws each prompt in the style of: pictures, folders of them, or several pictures with
            ";" between for one style together.
        pairs: a .csv with the columns prompt and style (again with ";"), each row of which `predict` draws.
        frames: clip length in `predict`; 1 draws pictures. By default pictures after "adapter", 8 after "temporal".
        frames_per_second: of the clips that `predict` writes; the released code's are 10.
        export_released: `export` also writes the weights in the layout of the released files.
        temporal_lr: peak learning rate of the motion modules in stage "joint"; by default the optimizer's.
        frozen_dtype: precision that the frozen UNet and encoders are kept in. "bfloat16" with `precision: bf16-mixed`
            saves the casts of every step and memory; what is trained stays float32.
        compile: compile the network for training; null does not. Samples are drawn, and validated, without.
        checkpointing: compute activations of the network again in the backward pass instead of keeping them: slower,
            less memory.
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str = "data/world-base",
        stage: Literal["adapter", "temporal", "joint"] = "adapter",
        motion: str | None = None,
        image_encoder: str | None = None,
        config: str | None = None,
        adapter: Adapter = Adapter(),
        adapter_weights: str | None = None,
        temporal_weights: str | None = None,
        style_weight: float = 1.0,
        drop_style: float = 0.0,
        drop_text: float = 0.0,
        drop_both: float = 0.0,
        decoupled: bool = True,
        timestep_bias: float = 0.0,
        error_of: Literal["noise", "clean"] = "noise",
        style_zoom: float = 800 / 512,
        negative: str = "",
        image_sampling: Sampling = Sampling(),
        video_sampling: Sampling = Sampling(text_scale=15.0, style_scale=7.5),
        oracle: str | None = None,
        prompts: list[str] | None = None,
        styles: list[str] | None = None,
        pairs: str | None = None,
        frames: int | None = None,
        frames_per_second: int = 8,
        export_released: bool = False,
        temporal_lr: float | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: Compile | None = None,
        checkpointing: bool = False,
        optimizer: Optimizer = Optimizer(),
    ) -> None:
        super().__init__(optimizer)
        at_least(1, frames=frames, frames_per_second=frames_per_second)
        if stage == "adapter" and (frames or 1) > 1:
            raise UserError(
                f'model.frames is {frames}, but stage "adapter" draws pictures; clips need stage "temporal"'
            )
        at_least(0, drop_style=drop_style, drop_text=drop_text, drop_both=drop_both)
        if drop_style + drop_text + drop_both > 1:
            raise UserError("model.drop_style, drop_text and drop_both are shares of the samples: at most 1 together")
        self.stage, self.style_weight, self.style_zoom = stage, style_weight, style_zoom
        self.drops = drop_style, drop_text, drop_both
        self._nothing: dict[tuple[int, int], TextCondition] = {}  # the empty prompt by size of the picture
        self.decoupled, self.timestep_bias, self.error_of = decoupled, timestep_bias, error_of
        self.negative, self.image_sampling, self.video_sampling = negative, image_sampling, video_sampling
        self.prompts, self.styles, self.pairs = prompts or [], styles or [], pairs
        self.frames = frames or (1 if stage == "adapter" else 8)
        self.frames_per_second = frames_per_second
        self.export_released, self.temporal_lr, self.compiled = export_released, temporal_lr, compile
        self.frozen_dtype = frozen_dtype
        self.base = load(base, stage, motion, image_encoder, config, temporal_weights)
        self.downscale = self.base.downscale
        for how in (image_sampling, video_sampling):
            if how.size is not None and any(side <= 0 or side % self.downscale for side in how.size):
                raise UserError(f"sampling.size {list(how.size)}: base {base!r} draws multiples of {self.downscale}")
        for convolutional in (self.base.vae, self.base.unet):  # the faster layout, on CPUs too
            convolutional.to(memory_format=torch.channels_last)
        self.schedule = Schedule(self.base.scheduler, f"base {self.base.path!r}")
        # After the base is loaded: the style layers start from its text keys and values.
        self.adapter_size = size_of(adapter_weights, adapter)
        self.adapter = StyleAdapter(self.base.unet, self.base.image_encoder.config.hidden_size, self.adapter_size)
        if adapter_weights:
            load_adapter(adapter_weights, self.adapter, self.base)
            # so that a checkpoint is enough to predict from, even where these weights are not trained
            self._inherited |= {f"adapter.{name}" for name in self.adapter.state_dict()}
        self.motion_unet: nn.Module | None = None
        self.longest: int | None = None  # clip that the temporal layers have positions for
        if stage != "adapter":
            self.adapter.requires_grad_(stage == "joint")
            if temporal_weights:
                self.base.motion_adapter = TemporalLayers.for_unet(self.base.unet)
                read_temporal(temporal_weights, self.base.motion_adapter)
            self.longest = self.base.motion_adapter.config.get("motion_max_seq_length")
            self._refuse_longer(self.frames, "model.frames is")
            self.motion_unet = motion_unet(self.base.unet, self.base.motion_adapter)
            self.base.motion_adapter = None  # its layers now belong to the motion UNet
            for modules in motion_modules(self.motion_unet):
                modules.requires_grad_(True)
        if frozen_dtype == "bfloat16":
            keep_frozen_in(torch.bfloat16, self.base, self.motion_unet)
        self.judgement = Judgement(stage, oracle)
        self._shown: dict[str, Tensor] = {}
        # Last: a motion UNet makes its own processors when it is built; the spatial layers, now shared, get ours.
        self.adapter.attach(self.base.unet)
        self.checkpointing = checkpointing

    def configure_model(self) -> None:
        network = self.motion_unet or self.base.unet
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        if self.compiled is not None:
            self.compiled.apply(network)

    def uncompiled(self) -> AbstractContextManager[None]:
        """Within, nothing is compiled: each new shape would be, for minutes, and what is drawn has many."""
        return nullcontext() if self.compiled is None else uncompiled()

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.stage != "joint":
            return super().parameter_groups()
        adapter = list(self.adapter.parameters())
        temporal = [p for p in self.motion_unet.parameters() if p.requires_grad]
        return [{"params": adapter}, {"params": temporal, "lr": self.temporal_lr or self.optimizer_settings.lr}]

    # -- conditions and network ---------------------------------------------------------------------------------------

    def text(self, prompts: Sequence[str], strict: bool = False, size: tuple[int, int] | None = None) -> TextCondition:
        """What the UNet is told of B prompts, for pictures of some size (height, width in pixels)."""
        return self.base.text_condition(prompts, strict, size)

    def read(self, pictures: Pictures) -> References:
        """References as `style` wants them: B 3 h w in [-1, 1]; B N 3 h w, N references each; or for each sample its
        own N 3 h w, where N, h and w may differ and a sample without any is drawn by the plain base. Order changes
        nothing."""
        return read(self.base.image_encoder, self.base.image_processor, pictures, self.adapter_size.image_layer)

    def style(self, references: Pictures | References, text: TextCondition, mask: Tensor | None = None) -> Style:
        """Style condition of B samples.

        Args:
            references: as of `read`, or what it gave.
            text: of the samples.
            mask: B, 1 styled and 0 the plain base; by default all are styled.
        """
        own = references if isinstance(references, References) else self.read(references)
        condition = self.adapter(own.tokens, text.states.to(own.tokens.dtype), self.style_weight, own.padding)
        for switch in (own.given, mask):
            if switch is not None:
                on = switch.to(condition.scale)
                condition.mask = on if condition.mask is None else condition.mask * on
        return condition

    def _refuse_longer(self, frames: int, said: str) -> None:
        if self.longest is not None and frames > self.longest:
            raise UserError(f"{said} {frames}, but the motion adapter has positions for {self.longest} frames at most")

    def network(self, noisy: Tensor, t: Tensor, text: TextCondition, style: Style | None) -> Tensor:
        """The UNet's output at noisy latents: B C h w through the 2D path, B F C h w through the temporal layers."""
        clips = noisy.ndim == 5
        if clips:  # motion UNets want the conditions of each frame
            frames, noisy = noisy.shape[1], noisy.transpose(1, 2)
            self._refuse_longer(frames, "clips have")
            text, style = text.repeat_frames(frames), None if style is None else style.repeat_frames(frames)
        given = None if style is None else {"style": style}
        # Whatever the trainer's precision: weights of two precisions meet in layers that want one.
        mixed = torch.autocast(noisy.device.type, torch.bfloat16) if self.frozen_dtype == "bfloat16" else nullcontext()
        with mixed:
            unet = self.motion_unet if clips else self.base.unet
            output = unet(noisy, t, **text.arguments, cross_attention_kwargs=given).sample
        return output.transpose(1, 2) if clips else output

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        kind = "clips" if "video" in batch else "pictures"
        loss = self.loss(batch).mean()
        self.log(f"train/loss on {kind}", loss, batch_size=len(batch["caption"]))
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Noise prediction error per sample [B] of a batch of pictures or clips."""
        encoded = batch if "posterior" in batch else self.encode_for_cache(batch)
        latents = self.base.draw(encoded["posterior"])  # B C h w, of clips B F C h w
        dtype = self.base.text_encoder.dtype
        pooled = encoded["text_embeds"].to(dtype) if "text_embeds" in encoded else None
        height, width = (side * self.downscale for side in latents.shape[-2:])
        text = self.base.told(encoded["text_states"].to(dtype), pooled, (height, width))
        style = self.style(self.references(batch), text)
        if "video" not in batch and self.stage != "adapter":
            # A clip of one frame: temporal attention then sees only itself, the identity mask of the paper's code.
            latents = latents[:, None]
        noise = torch.randn_like(latents)
        # The two settings make pictures teach the style; clips teach motion, alone or beside pictures in stage "joint".
        bias, error_of = (0.0, "noise") if "video" in batch else (self.timestep_bias, self.error_of)
        t = self.schedule.sample_timesteps(len(latents), latents.device, bias)
        if any(self.drops):
            text, style.mask = self._drop(text, style, (height, width))
        output = self.network(self.schedule.add_noise(latents, noise, t), t, text, style)
        error = self.schedule.loss(output, latents, noise, t)
        return error * self.schedule.clean_weight(t) if error_of == "clean" else error

    def _drop(self, text: TextCondition, style: Style, size: tuple[int, int]) -> tuple[TextCondition, Tensor]:
        """Text and mask (B) with the conditions of some samples left out; scales stay those of the whole prompt."""
        no_style, no_text, neither = self.drops
        draw = torch.rand(len(text), device=style.scale.device)
        both = draw < 1 - neither
        styled, told = both & (draw >= no_style), both & ((draw < no_style) | (draw >= no_style + no_text))
        if no_text + neither > 0:
            if size not in self._nothing:  # once: steps of cached data encode no text
                self._nothing[size] = self.text([""], size=size)
            text = text.where(told, self._nothing[size].expand(len(text)))
        return text, styled.to(style.scale.dtype)

    def references(self, batch: dict[str, Any]) -> Tensor:
        """The pictures B 3 h w that the samples of a training batch are to learn their style from: themselves."""
        if "video" in batch:
            video = batch["video"]
            # Unpublished in the paper; a frame of the clip itself, as the pictures' references come from themselves.
            frame = torch.randint(video.shape[1], (len(video),), device=video.device)
            chosen = video[torch.arange(len(video), device=video.device), frame]
            return random_view(chosen, self.style_zoom if self.decoupled else 1.0)
        if self.decoupled:
            return batch["style"]
        if "image" not in batch:
            raise UserError("model.decoupled is false, which reads the pictures themselves; leave out data's `cached`")
        return batch["image"]

    def cached_parts(self) -> dict[str, Any]:
        names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae")
        return {name: part for name in names if (part := getattr(self.base, name)) is not None}

    @torch.no_grad()
    def encode_for_cache(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Text and latents; the style comes from another view in every epoch."""
        if "video" in batch:  # whose captions come as they are; those of pictures are stripped by their data module
            video, captions = batch["video"], [strip_style(caption) for caption in batch["caption"]]
            posterior = self.base.posterior(video.flatten(0, 1)).unflatten(0, video.shape[:2])  # B F 2 C h w
        else:
            captions, posterior = batch["caption"], self.base.posterior(batch["image"])  # B 2 C h w
        text = self.text(captions)
        pooled = {} if text.added is None else {"text_embeds": text.added["text_embeds"]}
        return {"text_states": text.states, "posterior": posterior, **pooled}

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        references: Pictures | References | None,
        seeds: Sequence[int],
        frames: int = 1,
        strict: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draw one picture (or clip) per prompt.

        Args:
            prompts: B texts.
            references: as of `style`; None for the untouched base.
            seeds: B numbers that fix the noise of each sample.
            frames: 1 for pictures through the 2D path, more for clips.
            strict: refuse prompts that are too long instead of cutting them.
            mask: as of `style`.

        Returns:
            B 3 H W, or B F 3 H W, in [-1, 1].
        """
        how = self.image_sampling if frames == 1 else self.video_sampling
        height, width = how.size or self.base.picture_size()
        shape = (self.base.unet.config.in_channels, height // self.downscale, width // self.downscale)
        text = self.text(prompts, strict, (height, width))
        null = self.text([self.negative], strict, (height, width)).expand(len(text))
        style = None if references is None else self.style(references, text, mask)
        noise = noise_from(list(seeds), shape if frames == 1 else (frames, *shape), text.states.device)
        with self.uncompiled():
            latents = ddim(guided(self.network, null, text, style, how), self.schedule, noise, how.steps, how.eta)
        pictures = self.base.decode(latents if frames == 1 else latents.flatten(0, 1))
        return pictures if frames == 1 else pictures.unflatten(0, latents.shape[:2])

    # -- validation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch, show = real_samples(batch), batch_idx == 0 and not self.trainer.testing
        count = len(batch["caption"])
        with self.uncompiled():
            loss = self.loss(batch).mean() if count else torch.zeros((), device=self.device)
        # A rank with nothing but fillers says so, since the others wait for its figure.
        self.log("validation loss", loss, batch_size=count, sync_dist=True)
        if not count:
            return
        if "video" in batch:
            shown = self.judgement.judge_clips(self, batch, show)
        else:
            self.judgement.judge_pictures(self, batch)
            shown = self.judgement.show_pictures(self, batch) if show else {}
        self._shown = shown or self._shown

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        # the metrics have already been summed over ranks
        self.log_dict(self.judgement.scalars(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
        self.judgement.table.write(self.run_dir)

    def preview(self) -> dict[str, Tensor]:
        """What the last validation drew, for the `Samples` callback."""
        return self._shown

    # -- export --------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write the adapter to `adapter/`, and after later stages the motion modules to `motion_adapter/`."""
        save_all(folder, self.adapter, self.adapter_size, self.base, self.motion_unet, self.export_released)
