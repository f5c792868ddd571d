"""Load a frozen base: Stable-Diffusion-shaped models from the Hub, a local folder or a single-file checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.diffusion.text import TextCondition, encode_text, encode_text_twice
from lit_gen.errors import UserError

PIPELINE_PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
SINGLE_FILES = (".safetensors", ".ckpt")
# Images that go through the autoencoder at a time; at 512 x 512, where its activations are 1 GB an image, fewer.
AT_ONCE, PIXELS_AT_ONCE = 64, 16 * 512 * 512
VIDEOCRAFTER_CONFIG = "stabilityai/stable-diffusion-2-1-base"
TRANSFORMERS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
}
# A model's config.json may ask for attention code from the Hub; this keeps to torch's.
TRUSTED = {"use_safetensors": True, "attn_implementation": "sdpa"}
SECOND = {"tokenizer": "tokenizer_2", "text_encoder": "text_encoder_2"}  # SDXL has two


def precision_of(network: nn.Module) -> torch.dtype:
    """What a network's weights are kept in. diffusers' own `dtype` walks through all modules each time it is asked."""
    return next(network.parameters()).dtype


class Base(nn.Module):
    """The parts of a text-to-image (and text-to-video) model, frozen and in eval mode; parts not asked for are None.

    One module, so that a method that holds it moves it between devices with itself.
    """

    def __init__(self, path: str, parts: dict[str, Any]) -> None:
        super().__init__()
        self.path = path
        # of the UNet, and the image encoder, as they were loaded, where their precision is another since
        self.fingerprint: str | None = None
        self.image_fingerprint: str | None = None
        self.tokenizer = parts.get("tokenizer")
        self.text_encoder = parts.get("text_encoder")
        self.tokenizer_2 = parts.get("tokenizer_2")
        self.text_encoder_2 = parts.get("text_encoder_2")
        self.vae = parts.get("vae")
        self.unet = parts.get("unet")
        self.scheduler = parts.get("scheduler")
        self.image_encoder = parts.get("image_encoder")
        self.image_processor = parts.get("image_processor")
        self.motion_adapter = parts.get("motion_adapter")
        self.requires_grad_(False).eval()

    def text_condition(
        self, prompts: Sequence[str], strict: bool = False, size: tuple[int, int] | None = None
    ) -> TextCondition:
        """What the UNet is told of B prompts.

        Args:
            prompts: B texts.
            strict: refuse prompts that are too long instead of cutting them.
            size: height and width in pixels of the picture, which SDXL's UNet is told; by default the base's own.
        """
        if self.text_encoder_2 is None:
            return self.told(encode_text(self.tokenizer, self.text_encoder, prompts, strict))
        tokenizers, encoders = (self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2)
        return self.told(*encode_text_twice(tokenizers, encoders, prompts, strict), size)

    def told(self, states: Tensor, pooled: Tensor | None = None, size: tuple[int, int] | None = None) -> TextCondition:
        """The same from text that is already encoded: states B L D and, for SDXL, pooled embeddings B P."""
        if pooled is None:
            return TextCondition(states)
        height, width = size or self.picture_size()
        ids = (height, width, 0, 0, height, width)  # of the original, of the crop's corner, of the result
        time_ids = torch.tensor([ids] * len(states), dtype=states.dtype, device=states.device)
        return TextCondition(states, {"text_embeds": pooled, "time_ids": time_ids})

    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures the base was made for."""
        latent = self.unet.config.sample_size
        height, width = (latent, latent) if isinstance(latent, int) else latent
        return height * self.downscale, width * self.downscale

    @property
    def downscale(self) -> int:
        """Pixels, a side, of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images B 3 H W in [-1, 1] to scaled latents B C h w, drawn from the encoder's posterior."""
        return self.draw(self.posterior(images))

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """Images B 3 H W in [-1, 1] to the mean and standard deviation of their unscaled latents, B 2 C h w."""
        return torch.cat([torch.stack([part.mean, part.std], 1) for part in self._posteriors(images)])

    def encode_mean(self, images: Tensor) -> Tensor:
        """Images B 3 H W in [-1, 1] to the mean scaled latents B C h w of their posteriors, with gradient."""
        return self._scaled(torch.cat([part.mean for part in self._posteriors(images)]))

    def _posteriors(self, images: Tensor) -> list[Any]:
        with self._own_precision():
            parts = images.to(precision_of(self.vae)).split(_at_once(*images.shape[-2:]))
            return [self.vae.encode(part).latent_dist for part in parts]

    def draw(self, posterior: Tensor) -> Tensor:
        """Scaled latents [...] C h w drawn from posteriors [...] 2 C h w, which may be of a lower precision."""
        mean, std = posterior.to(precision_of(self.vae)).unbind(-4)
        return self._scaled(mean + std * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device))

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents B C h w to images B 3 H W in [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        height, width = (side * self.downscale for side in latents.shape[-2:])
        with self._own_precision():
            parts = latents.to(precision_of(self.vae)).split(_at_once(height, width))
            return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in parts])

    def _own_precision(self) -> AbstractContextManager:
        # Autoencoders lose detail, and Stable Diffusion's overflows, in the half precision of mixed training.
        device = self.vae.device.type
        return torch.autocast(device, enabled=False) if device != "meta" else nullcontext()


def _at_once(height: int, width: int) -> int:
    return min(AT_ONCE, max(PIXELS_AT_ONCE // (height * width), 1))


def load_base(
    path: str,
    motion: str | None = None,
    parts: Sequence[str] = PIPELINE_PARTS,
    dtype: torch.dtype = torch.float32,
    image_encoder: str | None = None,
    config: str | None = None,
) -> Base:
    """Load the named parts of a base.

    Args:
        path: a Hub id ("stable-diffusion-v1-5/stable-diffusion-v1-5"), a local diffusers folder, or one
            `.safetensors`/`.ckpt` file in the original layout of Stable Diffusion 1.x/2.x/XL or of VideoCrafter1.
        motion: folder or Hub id of an AnimateDiff motion adapter or of VideoCrafter1's temporal layers; by default
            `motion_adapter/` in the base's folder, or the checkpoint's own, when `parts` names it.
        parts: of PIPELINE_PARTS plus "image_encoder" (with its image_processor) and "motion_adapter". Of SDXL
            both tokenizers and both text encoders are loaded.
        dtype: of all weights.
        image_encoder: folder or Hub id, optionally with a folder inside ("h94/IP-Adapter/models/image_encoder"), of a
            CLIP vision model; by default `image_encoder/` in the base's folder, when `parts` names it.
        config: for a single file: the diffusers folder (or Hub id) with the model configs and the tokenizer. By default
            the usual one of that model family, which must then be cached or downloadable.

    Raises:
        UserError: nothing there, a part missing, or offline and not cached; one line with the nearest name.
    """
    with quietly():
        return _load_base(path, motion, parts, dtype, image_encoder, config)


def _load_base(
    path: str,
    motion: str | None,
    parts: Sequence[str],
    dtype: torch.dtype,
    image_encoder: str | None,
    config: str | None,
) -> Base:
    wanted = set(parts) | ({"motion_adapter"} if motion else set()) | ({"image_encoder"} if image_encoder else set())
    loaded: dict[str, Any] = {}
    pipeline_parts = [p for p in PIPELINE_PARTS if p in wanted]
    folder = path
    if path.endswith(SINGLE_FILES):
        _require_file(path)
        loaded = _load_single_file(path, config, [*pipeline_parts, *wanted & {"motion_adapter"}], dtype)
        folder = config or path
    else:
        _require_folder_or_id(path)
        if wanted & SECOND.keys() and _has_second(path):
            pipeline_parts += [SECOND[p] for p in SECOND if p in wanted]
        for part in pipeline_parts:
            loaded[part] = _load_part(part, path, part, dtype)
    if "image_encoder" in wanted:
        root, sub = _split_id(image_encoder) if image_encoder else (folder, "image_encoder")
        loaded["image_encoder"] = _load_part("image_encoder", root, sub, dtype)
        # IP-Adapter's encoder folder has no processor; its CLIP uses the usual one.
        loaded["image_processor"] = _load_processor(root, sub if image_encoder else "feature_extractor")
    if "motion_adapter" in wanted and (motion or "motion_adapter" not in loaded):
        root, sub = _split_id(motion) if motion else (folder, "motion_adapter")
        loaded["motion_adapter"] = _load_part("motion_adapter", root, sub, dtype)
    return Base(path, loaded)


def _load_part(part: str, root: str, subfolder: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    if Path(root).is_dir() and not (Path(root) / subfolder).is_dir():
        raise UserError(f"base {root!r} has no {subfolder}/ folder{_nearest(subfolder, Path(root))}")
    where = {"subfolder": subfolder} if subfolder else {}
    with _one_line(f"{part} of base {root!r}", root):
        if part in ("tokenizer", "tokenizer_2"):
            return transformers.CLIPTokenizer.from_pretrained(root, **where)
        if part == "scheduler":
            return diffusers.DDIMScheduler.from_pretrained(root, **where)
        _refuse_pickles(Path(root) / subfolder)
        if part in TRANSFORMERS:
            return getattr(transformers, TRANSFORMERS[part]).from_pretrained(root, dtype=dtype, **TRUSTED, **where)
        where["use_safetensors"] = True
        if part == "motion_adapter":
            return _motion_class(root, where).from_pretrained(root, torch_dtype=dtype, **where)
        name = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}[part]
        return getattr(diffusers, name).from_pretrained(root, torch_dtype=dtype, **where)


def _refuse_pickles(folder: Path) -> None:
    """Weights that only exist in a format that can carry code are named, not read."""
    pickled = [f for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise UserError(f"{pickled[0]}: weights in a format that can run code; convert them to .safetensors")


def _motion_class(root: str, where: dict[str, str]) -> Any:
    from diffusers import MotionAdapter

    from lit_gen.diffusion.videocrafter import TemporalLayers

    made_by = MotionAdapter.load_config(root, **where).get("_class_name")
    return TemporalLayers if made_by == TemporalLayers.__name__ else MotionAdapter


def _has_second(root: str) -> bool:
    """Whether a folder or Hub id is of SDXL, with its two text encoders."""
    if Path(root).is_dir():
        return (Path(root) / "text_encoder_2").is_dir()
    from diffusers import DiffusionPipeline

    try:
        return "text_encoder_2" in DiffusionPipeline.load_config(root)
    except OSError:  # without an index; if the Hub cannot be reached, loading the parts says so
        return False


def _load_processor(root: str, subfolder: str) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        return CLIPImageProcessorPil.from_pretrained(root, subfolder=subfolder)
    except (OSError, ValueError):
        return CLIPImageProcessorPil()


def _load_single_file(path: str, config: str | None, parts: list[str], dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    from lit_gen.diffusion.original_layout import is_sdxl, is_videocrafter, weight_names

    if config is not None:
        _require_folder_or_id(config)
        _require_known_classes(config)
    names = weight_names(path)
    if is_videocrafter(names):
        config = config or VIDEOCRAFTER_CONFIG
    with _one_line(f"single-file base {path!r}" + (f" with config {config!r}" if config else ""), config or path):
        if is_videocrafter(names):
            return _load_videocrafter(path, config, parts, dtype)
        unwanted: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
        if is_sdxl(names):
            parts = [*parts, *(SECOND[p] for p in SECOND if p in parts)]
            pipeline = StableDiffusionXLPipeline.from_single_file(path, config=config, torch_dtype=dtype, **unwanted)
        else:
            unwanted["safety_checker"] = None
            pipeline = StableDiffusionPipeline.from_single_file(path, config=config, torch_dtype=dtype, **unwanted)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return {part: getattr(pipeline, part) for part in parts if part != "motion_adapter"}


def _require_known_classes(config: str) -> None:
    """A pipeline imports the modules that its model_index.json names: they must be the libraries' own."""
    from diffusers import DiffusionPipeline

    try:
        named = DiffusionPipeline.load_config(config)
    except (OSError, ValueError):  # loading it says what is wrong
        return
    for part, place in named.items():
        if isinstance(place, list) and place[0] not in (None, "diffusers", "transformers", "stable_diffusion"):
            raise UserError(
                f"{config}/model_index.json: refused, since its {part} is code of another library, {place[0]}"
            )


def _load_videocrafter(path: str, config: str, parts: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """All parts of a VideoCrafter1 base, whose spatial layers have the shapes of Stable Diffusion 2.x."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from lit_gen.diffusion.original_layout import read_videocrafter, read_weights, videocrafter_scheduler
    from lit_gen.diffusion.videocrafter import TemporalLayers

    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config, subfolder="unet"))
    loaded = {
        "unet": unet,
        "motion_adapter": TemporalLayers.for_unet(unet),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(config, subfolder="vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(config, subfolder="text_encoder")),
    }
    read_videocrafter(read_weights(path), *loaded.values(), what=f"base {path!r} is not VideoCrafter1's")
    loaded = {name: part.to(dtype) for name, part in loaded.items()}
    loaded["tokenizer"] = CLIPTokenizer.from_pretrained(config, subfolder="tokenizer")
    loaded["scheduler"] = videocrafter_scheduler()  # not the config's, which for Stable Diffusion 2.1 predicts velocity
    return {part: loaded[part] for part in parts}


def _require_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"base {path!r}: no such file{_nearest(Path(path).name, Path(path).parent)}")


def _require_folder_or_id(path: str) -> None:
    """A folder that exists, or something that can be a Hub id (owner/name)."""
    if Path(path).is_dir():
        return
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if local:
        raise UserError(
            f"base {path!r}: no such folder{_nearest(Path(path).name, Path(path).parent)}, "
            "and not a Hub id of the form owner/name"
        )


def _split_id(path: str) -> tuple[str, str]:
    """ "owner/name/sub/folder" -> ("owner/name", "sub/folder"); a local folder stays whole."""
    if Path(path).is_dir():
        return path, ""
    owner_name, rest = path.split("/")[:2], path.split("/")[2:]
    if not rest:
        _require_folder_or_id(path)
    return "/".join(owner_name), "/".join(rest)


def _nearest(name: str, folder: Path) -> str:
    """ ", nearest is 'x'" when the folder has a similar entry, else an empty string."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {str(folder / near[0])!r}?)" if near else ""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' progress bars and their remarks on casts that change nothing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    level, bars = diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_line(what: str, root: str) -> Iterator[None]:
    """Turn the libraries' many-line loading errors into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if Path(root).exists():
            raise UserError(f"cannot load {what}: {first}") from error
        raise UserError(
            f"cannot load {what}: not a local folder, and not in the Hub cache or the Hub cannot be reached; "
            f"download it once while online (hf download {root}) or give a local folder"
        ) from error
