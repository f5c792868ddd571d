"""Load a frozen base: Stable-Diffusion-shaped models from the Hub, a local folder or a single-file checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import UserError

PIPELINE_PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
SINGLE_FILES = (".safetensors", ".ckpt")


class Base(nn.Module):
    """The parts of a text-to-image (and text-to-video) model, frozen and in eval mode; parts not asked for are None.

    One module, so that a method that holds it moves it between devices with itself.
    """

    def __init__(self, path: str, parts: dict[str, Any]) -> None:
        super().__init__()
        self.path = path
        self.tokenizer = parts.get("tokenizer")
        self.text_encoder = parts.get("text_encoder")
        self.vae = parts.get("vae")
        self.unet = parts.get("unet")
        self.scheduler = parts.get("scheduler")
        self.image_encoder = parts.get("image_encoder")
        self.image_processor = parts.get("image_processor")
        self.motion_adapter = parts.get("motion_adapter")
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images B 3 H W in [-1, 1] to scaled latents B C h w, drawn from the encoder's posterior."""
        with self._own_precision():
            latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.sample()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents B C h w to images B 3 H W in [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        with self._own_precision():
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def _own_precision(self) -> torch.autocast:
        # Autoencoders lose detail, and Stable Diffusion's overflows, in the half precision of mixed training.
        return torch.autocast(self.vae.device.type, enabled=False)


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
            `.safetensors`/`.ckpt` file in the original layout of Stable Diffusion 1.x/2.x.
        motion: folder or Hub id of an AnimateDiff motion adapter; by default `motion_adapter/` in the base's folder,
            when `parts` names it.
        parts: of PIPELINE_PARTS plus "image_encoder" (with its image_processor) and "motion_adapter".
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
        loaded = _load_single_file(path, config, pipeline_parts, dtype)
        folder = config or path
    else:
        _require_folder_or_id(path)
        for part in pipeline_parts:
            loaded[part] = _load_part(part, path, part, dtype)
    if "image_encoder" in wanted:
        root, sub = _split_id(image_encoder) if image_encoder else (folder, "image_encoder")
        loaded["image_encoder"] = _load_part("image_encoder", root, sub, dtype)
        # IP-Adapter's encoder folder has no processor; its CLIP uses the usual one.
        loaded["image_processor"] = _load_processor(root, sub if image_encoder else "feature_extractor")
    if "motion_adapter" in wanted:
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
        if part == "tokenizer":
            return transformers.CLIPTokenizer.from_pretrained(root, **where)
        if part == "scheduler":
            return diffusers.DDIMScheduler.from_pretrained(root, **where)
        if part in ("text_encoder", "image_encoder"):
            name = "CLIPTextModel" if part == "text_encoder" else "CLIPVisionModelWithProjection"
            return getattr(transformers, name).from_pretrained(root, dtype=dtype, **where)
        name = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "motion_adapter": "MotionAdapter"}[part]
        return getattr(diffusers, name).from_pretrained(root, torch_dtype=dtype, **where)


def _load_processor(root: str, subfolder: str) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        return CLIPImageProcessorPil.from_pretrained(root, subfolder=subfolder)
    except (OSError, ValueError):
        return CLIPImageProcessorPil()


def _load_single_file(path: str, config: str | None, parts: list[str], dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if config is not None:
        _require_folder_or_id(config)
    with _one_line(f"single-file base {path!r}" + (f" with config {config!r}" if config else ""), config or path):
        pipeline = StableDiffusionPipeline.from_single_file(
            path, config=config, torch_dtype=dtype, safety_checker=None, feature_extractor=None, image_encoder=None
        )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return {part: getattr(pipeline, part) for part in parts}


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
