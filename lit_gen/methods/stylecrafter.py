"""StyleCrafter (arXiv 2312.00330): pictures and clips of a prompt in the style of a reference picture.

Stage "adapter": on stylised pictures, learns style tokens read from a crop of the picture and a style cross-attention
beside the text's. Stage "temporal": on the same pictures and ordinary clips, finetunes only the motion modules, so that
styled clips stay steady although no styled clip was ever seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_gen.callbacks.samples import contact_sheet, save
from lit_gen.data.facts import scenes_from_facts
from lit_gen.data.styled import strip_style
from lit_gen.diffusion.attention import Style, attach_style
from lit_gen.diffusion.base import PIPELINE_PARTS, load_base
from lit_gen.diffusion.image_prompt import encode_image
from lit_gen.diffusion.objective import Schedule
from lit_gen.diffusion.sampling import Denoise, classifier_free, ddim, noise_from, two_scale
from lit_gen.diffusion.style_adapter import Adapter, StyleAdapter
from lit_gen.diffusion.temporal import motion_modules, motion_unet
from lit_gen.diffusion.text import encode_text
from lit_gen.errors import UserError
from lit_gen.methods.base import Method, Optimizer
from lit_gen.methods.style_transfer import (
    ClipScores,
    PictureScores,
    in_nearest_style,
    partners,
    read_references,
    strangers,
)

# Groups of validation scalars: our pictures, and those of the untouched base told the nearest style's name.
ADAPTER, WORDS = "adapter", "base with style words"


@dataclass
class Sampling:
    """How pictures and clips are drawn.

    Args:
        steps: DDIM steps.
        eta: 0 deterministic, 1 as noisy as DDPM.
        text_scale: guidance towards the prompt, l_t of Eq. 2.
        style_scale: guidance towards the style, l_s of Eq. 2.
    """

    steps: int = 50
    eta: float = 1.0
    text_scale: float = 7.5
    style_scale: float = 5.0


class StyleCrafter(Method):
    """Style adapter and temporal finetuning.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the text-to-image model.
        stage: "adapter" trains the style adapter on pictures; "temporal" the motion modules on pictures and clips.
        motion: folder or Hub id of the motion adapter; by default `motion_adapter/` in the base's folder.
        image_encoder: folder or Hub id of the CLIP vision model; by default `image_encoder/` in the base's folder.
        config: for a single-file base, the diffusers folder with its model configs and tokenizer.
        adapter: size of the style adapter.
        style_weight: strength of the style, lambda.
        drop_style: share of training samples that get no style; the paper drops none.
        timestep_bias: timesteps are drawn with a density proportional to t to this power; the paper's 0 is uniform.
        error_of: what the squared error is of: the "noise", as in the paper, or the "clean" latent that the predicted
            noise implies. The colours of a small picture show through all but the strongest noise, so there the paper's
            loss learns little from the reference (ours: bias 2 and "clean" find the style in a tenth of the steps).
        style_zoom: short side of the picture a clip's reference is cropped from, in units of the clip's size.
        image_sampling: how pictures are drawn.
        video_sampling: how clips are drawn.
        oracle: folder of the oracle that scores validation samples of the world; null for data without ground truth.
        prompts: what `predict` draws.
        styles: reference pictures, or folders of them, that `predict` draws each prompt in the style of.
        frames: clip length in `predict`; 1 draws pictures. By default pictures after "adapter", 8 after "temporal".
        optimizer: settings of the optimizer.
    """

    def __init__(
        self,
        base: str = "data/world-base",
        stage: Literal["adapter", "temporal"] = "adapter",
        motion: str | None = None,
        image_encoder: str | None = None,
        config: str | None = None,
        adapter: Adapter = Adapter(),
        style_weight: float = 1.0,
        drop_style: float = 0.0,
        timestep_bias: float = 0.0,
        error_of: Literal["noise", "clean"] = "noise",
        style_zoom: float = 800 / 512,
        image_sampling: Sampling = Sampling(),
        video_sampling: Sampling = Sampling(text_scale=15.0, style_scale=7.5),
        oracle: str | None = None,
        prompts: list[str] | None = None,
        styles: list[str] | None = None,
        frames: int | None = None,
        optimizer: Optimizer = Optimizer(),
    ) -> None:
        super().__init__(optimizer)
        if stage == "adapter" and (frames or 1) > 1:
            raise UserError(
                f'model.frames is {frames}, but stage "adapter" draws pictures; clips need stage "temporal"'
            )
        self.stage, self.style_weight, self.drop_style, self.style_zoom = stage, style_weight, drop_style, style_zoom
        self.timestep_bias, self.error_of = timestep_bias, error_of
        self.image_layer = adapter.image_layer
        self.image_sampling, self.video_sampling = image_sampling, video_sampling
        self.prompts, self.styles = prompts or [], styles or []
        self.frames = frames or (8 if stage == "temporal" else 1)
        extra = ("image_encoder", "motion_adapter") if stage == "temporal" else ("image_encoder",)
        self.base = load_base(base, motion, (*PIPELINE_PARTS, *extra), image_encoder=image_encoder, config=config)
        for convolutional in (self.base.vae, self.base.unet):  # the faster layout, on CPUs too
            convolutional.to(memory_format=torch.channels_last)
        self.schedule = Schedule(self.base.scheduler)
        # After the base is loaded: the style layers start from its text keys and values.
        self.adapter = StyleAdapter(self.base.unet, self.base.image_encoder.config.hidden_size, adapter)
        self.motion_unet: nn.Module | None = None
        if stage == "temporal":
            self.adapter.requires_grad_(False)
            self.motion_unet = motion_unet(self.base.unet, self.base.motion_adapter)
            self.base.motion_adapter = None  # its layers now belong to the motion UNet
            for modules in motion_modules(self.motion_unet):
                modules.requires_grad_(True)
        judged = stage == "adapter" and oracle is not None
        self.scores = nn.ModuleDict({name: PictureScores(oracle) for name in (ADAPTER, WORDS)} if judged else {})
        self.clip_scores = ClipScores(oracle) if stage == "temporal" else None
        self._shown: dict[str, Tensor] = {}
        self._drawn: list[tuple[Tensor, list[Tensor]]] = []
        # Last: a motion UNet makes its own processors when it is built; the spatial layers, now shared, get ours.
        attach_style(self.base.unet, self.adapter.layers)

    # -- conditions and network ---------------------------------------------------------------------------------------

    def text(self, prompts: Sequence[str], strict: bool = False) -> Tensor:
        """Text states B L D."""
        return encode_text(self.base.tokenizer, self.base.text_encoder, prompts, strict)

    def style(self, references: Tensor, text: Tensor) -> Style:
        """Style condition from references B 3 h w in [-1, 1] (or B N 3 h w, N references each) and text states."""
        batch = len(references)
        images = references if references.ndim == 4 else references.flatten(0, 1)
        tokens = encode_image(self.base.image_encoder, self.base.image_processor, images, self.image_layer)
        return self.adapter(tokens.unflatten(0, (batch, -1)).flatten(1, 2), text, self.style_weight)

    def network(self, noisy: Tensor, t: Tensor, text: Tensor, style: Style | None) -> Tensor:
        """The UNet's output at noisy latents: B C h w through the 2D path, B F C h w through the temporal layers."""
        if noisy.ndim == 4:
            given = None if style is None else {"style": style}
            return self.base.unet(noisy, t, text, cross_attention_kwargs=given).sample
        frames = noisy.shape[1]
        given = None if style is None else {"style": style.repeat_frames(frames)}
        text = text.repeat_interleave(frames, 0)  # UNetMotionModel wants one per frame
        return self.motion_unet(noisy.transpose(1, 2), t, text, cross_attention_kwargs=given).sample.transpose(1, 2)

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        kind = "clips" if "video" in batch else "pictures"
        loss = self.loss(batch).mean()
        self.log(f"train/loss on {kind}", loss, prog_bar=True, batch_size=len(batch["caption"]))
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Noise prediction error per sample [B] of a batch of pictures or clips."""
        clips = "video" in batch  # whose captions come as they are; those of pictures are stripped by their data module
        text = self.text([strip_style(c) for c in batch["caption"]] if clips else batch["caption"])
        if clips:
            video = batch["video"]
            latents = self.base.encode(video.flatten(0, 1)).unflatten(0, video.shape[:2])  # B F C h w
            # Unpublished in the paper; a frame of the clip itself, as the pictures' references come from themselves.
            frame = torch.randint(video.shape[1], (len(video),), device=video.device)
            references = random_view(video[torch.arange(len(video), device=video.device), frame], self.style_zoom)
        else:
            latents, references = self.base.encode(batch["image"]), batch["style"]
            if self.stage == "temporal":
                # A clip of one frame: temporal attention then sees only itself, the identity mask of the paper's code.
                latents = latents[:, None]
        style = self.style(references, text)
        noise = torch.randn_like(latents)
        t = self.schedule.sample_timesteps(len(latents), latents.device, self.timestep_bias)
        if self.drop_style > 0:
            style.mask = (torch.rand(len(text), device=text.device) >= self.drop_style).to(style.scale.dtype)
        output = self.network(self.schedule.add_noise(latents, noise, t), t, text, style)
        error = self.schedule.loss(output, latents, noise, t)
        return error * self.schedule.clean_weight(t) if self.error_of == "clean" else error

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        references: Tensor | None,
        seeds: Sequence[int],
        frames: int = 1,
        strict: bool = False,
    ) -> Tensor:
        """Draw one picture (or clip) per prompt.

        Args:
            prompts: B texts.
            references: B 3 h w in [-1, 1] (or B N 3 h w), or None for the untouched base.
            seeds: B numbers that fix the noise of each sample.
            frames: 1 for pictures through the 2D path, more for clips.
            strict: refuse prompts that are too long instead of cutting them.

        Returns:
            B 3 H W, or B F 3 H W, in [-1, 1].
        """
        how = self.image_sampling if frames == 1 else self.video_sampling
        unet = self.base.unet.config
        size = (unet.sample_size, unet.sample_size) if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
        shape = (unet.in_channels, *size) if frames == 1 else (frames, unet.in_channels, *size)
        text = self.text(prompts, strict)
        style = None if references is None else self.style(references, text)
        noise = noise_from(list(seeds), shape, text.device)
        latents = ddim(self.guided(text, style, how), self.schedule, noise, how.steps, how.eta)
        pictures = self.base.decode(latents if frames == 1 else latents.flatten(0, 1))
        return pictures if frames == 1 else pictures.unflatten(0, latents.shape[:2])

    def guided(self, text: Tensor, style: Style | None, how: Sampling) -> Denoise:
        """Guided network output; all terms of Eq. 2 go through the UNet as one batch."""
        null = self.text([""]).expand_as(text)
        # With equal scales e(c_t) falls out of Eq. 2, and with it a third of the work.
        joint = style is None or how.text_scale == how.style_scale
        states = torch.cat([null, text] if joint else [null, text, text])
        terms = len(states) // len(text)
        styles = None if style is None else Style.cat([style.null()] * (terms - 1) + [style])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            outputs = self.network(torch.cat([x] * terms), torch.cat([t] * terms), states, styles).chunk(terms)
            if joint:
                return classifier_free(*outputs, how.text_scale)
            return two_scale(*outputs, how.text_scale, how.style_scale)

        return denoise

    # -- validation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch = real_samples(batch)
        if not batch["caption"]:
            return
        self.log("validation loss", self.loss(batch).mean(), batch_size=len(batch["caption"]), sync_dist=True)
        if "video" in batch:
            self.validate_clips(batch, batch_idx)
        else:
            self.validate_pictures(batch, batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def validate_pictures(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score each prompt in the style of another sample, and the base that is told the nearest style's name."""
        if self.scores:
            chosen = partners(batch)
            scenes = scenes_from_facts(batch["facts"]).to(self.device)
            seeds = [seed_of(key) for key in batch["key"]]
            pictures = self.sample(batch["caption"], batch["style"][chosen], seeds)
            self.scores[ADAPTER].update(pictures, scenes, scenes[torch.tensor(chosen, device=self.device)])
            wanted = scenes.style_parameters[chosen]
            words, named = in_nearest_style(batch["facts"], wanted)
            pictures = self.sample(words, None, seeds)
            named = named.to(self.device)
            self.scores[WORDS].update(pictures, named, scenes[torch.tensor(chosen, device=self.device)])
        if batch_idx == 0:
            count = max(min(4, len(batch["caption"]) // 2), 1)
            references = list(batch["style"][strangers(batch, count, count)])
            self._shown = {"prompts x styles": self.draw_grid(batch["caption"][:count], references)}

    def validate_clips(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score each prompt's clip in the style of another clip against real clips of those styles."""
        chosen, video = partners(batch), batch["video"]
        captions = [strip_style(caption) for caption in batch["caption"]]
        references = random_view(video[chosen, 0], self.style_zoom)
        seeds = [seed_of(key) for key in batch["key"]]
        clips = self.sample(captions, references, seeds, frames=video.shape[1])
        known = all("style_parameters" in facts for facts in batch["facts"])
        scenes = scenes_from_facts(batch["facts"]).to(self.device) if known else None
        self.clip_scores.update(clips, video, scenes, scenes.style_parameters[chosen] if known else None)
        if batch_idx == 0:
            rows = [list(references[:4]), list(clips[:4]), list(video[:4])]
            self._shown = {
                "clips": contact_sheet(rows, captions[:4], ["reference", "generated", "real clip in its own style"])
            }

    def on_validation_epoch_end(self) -> None:
        scores = {name: scores.compute() for name, scores in self.scores.items()}
        if self.clip_scores is not None:
            scores["clips"] = self.clip_scores.compute()
        for group, values in scores.items():  # the metrics have already been summed over ranks
            self.log_dict({f"{group}/{name}": value for name, value in values.items()}, sync_dist=True)
        if self.scores:
            self.log("style error, adapter over words", scores[ADAPTER]["style error"] / scores[WORDS]["style error"])

    def preview(self) -> dict[str, Tensor]:
        """What the last validation drew, for the `Samples` callback."""
        return self._shown

    def draw_grid(self, prompts: Sequence[str], references: Sequence[Tensor]) -> Tensor:
        """One sheet 3 H W of every prompt (columns) in every style (rows, references 3 h w in front)."""
        rows = []
        for reference in references:
            seeds = [seed_of(prompt) for prompt in prompts]
            rows.append(list(self.sample(prompts, reference.expand(len(prompts), -1, -1, -1), seeds)))
        return contact_sheet(rows, prompts, list(references))

    # -- prediction ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "predict":  # else Lightning asks the experiment's data module, which knows no prompts
            self.trainer.predict_loop._data_source.instance = self

    def predict_dataloader(self) -> DataLoader:
        """Each reference with all prompts.

        Raises:
            UserError: no prompts or no styles, or a reference that cannot be read.
        """
        if not self.prompts or not self.styles:
            missing = "prompts (--prompt TEXT)" if not self.prompts else "styles (--style FILE)"
            raise UserError(f"predict draws prompts in the style of pictures, and no {missing} were given")
        return DataLoader(read_references(self.styles, self.base.image_encoder.config.image_size), batch_size=None)

    def predict_step(self, reference: tuple[str, Tensor], batch_idx: int) -> list[Tensor]:
        """All prompts in the style of one reference, written to `samples/predict/` of the run folder."""
        name, picture = reference
        views = picture.to(self.device).expand(len(self.prompts), -1, -1, -1)
        seeds = [seed_of(prompt) for prompt in self.prompts]
        drawn = list(self.sample(self.prompts, views, seeds, self.frames, strict=True).cpu())
        for i, sample in enumerate(drawn):
            save(self.predictions / f"{name}-{i:02d}", sample)
        self._drawn.append((picture.cpu(), drawn))
        return drawn

    def on_predict_epoch_end(self) -> None:
        references, rows = zip(*self._drawn, strict=True)
        rank = f"-{self.global_rank}" if self.trainer.world_size > 1 else ""
        path = save(self.predictions / f"contact-sheet{rank}", contact_sheet(rows, self.prompts, references))
        self._drawn = []
        print(f"drawn: {path}")

    @property
    def predictions(self) -> Path:
        """Where `predict` writes."""
        return self.run_dir / "samples" / "predict"


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


COLUMNS = ("image", "video", "style", "style_parameters", "caption", "key", "facts", "valid")
