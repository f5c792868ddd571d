"""A trained style adapter as a folder: `config.json`, which says its size and its base, and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lit_gen.diffusion.attention import cross_attentions
from lit_gen.diffusion.original_layout import read_weights, require_same
from lit_gen.diffusion.style_adapter import Adapter, StyleAdapter
from lit_gen.diffusion.videocrafter import VideoUNet
from lit_gen.errors import UserError
from lit_gen.files import write_tensors
from lit_gen.methods.stylecrafter_weights import read_adapter, released_size, write_adapter, write_temporal

log = logging.getLogger(__name__)
CONFIG, WEIGHTS, SUBFOLDER = "config.json", "model.safetensors", "adapter"


def save_all(
    folder: Path, adapter: StyleAdapter, size: Adapter, base: Any, motion_unet: nn.Module | None, released: bool = False
) -> None:
    """Write the adapter to `adapter/` and the temporal layers to `motion_adapter/`, as `load_base` reads them.

    Args:
        folder: where to.
        adapter, size, base: as of `save_adapter`.
        motion_unet: whose temporal layers are written too; None for none.
        released: also write both in the layout of the released files, the latter only of VideoCrafter1's kind.
    """
    save_adapter(folder / SUBFOLDER, adapter, size, base)
    layers = motion_unet.motion_modules if isinstance(motion_unet, VideoUNet) else None
    if layers is not None:
        layers.save_pretrained(folder / "motion_adapter")
    elif motion_unet is not None:
        motion_unet.save_motion_modules(folder / "motion_adapter")
    if released:
        write_adapter(folder / "adapter.pth", adapter, base.unet)
        if layers is not None:
            write_temporal(folder / "temporal.pth", layers)


def save_adapter(folder: Path, adapter: StyleAdapter, size: Adapter, base: Any) -> None:
    """Write the folder.

    Args:
        folder: where to; made if it is not there.
        adapter: with its weights.
        size: it was built with.
        base: a `Base`, that it was trained for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": StyleAdapter.__name__,
        "base": base.path,
        "base_fingerprint": base.fingerprint or fingerprint(base.unet),
        "image_encoder_fingerprint": base.image_fingerprint or image_fingerprint(base.image_encoder),
        **_fit(adapter, base.unet),
        "size": dataclasses.asdict(size),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    state = {name: weight.detach().cpu().contiguous().clone() for name, weight in adapter.state_dict().items()}
    write_tensors(folder / WEIGHTS, state, {"format": "pt"})


def size_of(path: str | None, given: Adapter) -> Adapter:
    """The size of a saved adapter, or of a released one; `given` where there is none."""
    if path is None:
        return given
    if not Path(path).is_dir():
        return released_size(read_weights(path), given, path)
    config = _read_config(_folder(path))
    known = {field.name for field in dataclasses.fields(Adapter)}
    if unknown := config["size"].keys() - known:
        raise UserError(f"{path}: has an adapter setting that is not known here, {sorted(unknown)[0]!r}")
    return Adapter(**config["size"])


def load_adapter(path: str, adapter: StyleAdapter, base: Any) -> None:
    """Give an adapter of the right size the weights of a folder, or of a released file.

    Raises:
        UserError: there are none, they are damaged, or the adapter was trained for a base of another shape or for
            another image encoder.
    """
    if not Path(path).is_dir():
        read_adapter(path, adapter, base.unet)
        return
    folder = _folder(path)
    config, own = _read_config(folder), _fit(adapter, base.unet)
    for name, here in own.items():
        if (there := config.get(name)) != here:
            raise UserError(
                f"{path}: the adapter was trained for base {config.get('base')!r} and does not fit {base.path!r}: "
                f"its {name.replace('_', ' ')} are {there}, here {here}"
            )
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    require_same(state, adapter.state_dict(), f"{folder / WEIGHTS} does not have the weights its {CONFIG} promises")
    adapter.load_state_dict(state)
    if next(base.unet.parameters()).device.type == "meta":
        return
    if config.get("image_encoder_fingerprint") not in (None, image_fingerprint(base.image_encoder)):
        raise UserError(
            f"{path}: the adapter was trained to read another image encoder than this one (model.image_encoder; by "
            f"default image_encoder/ in {base.path!r}), whose tokens mean nothing to it"
        )
    if config.get("base_fingerprint") != fingerprint(base.unet):
        log.warning(
            "%s: the adapter was trained for other weights than those of %r (for %r); styles may be off",
            *(path, base.path, config.get("base")),
        )


def fingerprint(unet: nn.Module) -> str:
    """16 hex digits of the text keys that the style layers start from."""
    digest = hashlib.sha256()
    for attention in cross_attentions(unet).values():
        digest.update(attention.to_k.weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def image_fingerprint(encoder: nn.Module) -> str:
    """16 hex digits of the first and the last weights of a CLIP vision model that a picture meets."""
    tower = encoder.vision_model
    digest = hashlib.sha256()
    for weight in (tower.embeddings.patch_embedding.weight, tower.encoder.layers[-1].mlp.fc2.weight):
        digest.update(weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fit(adapter: StyleAdapter, unet: nn.Module) -> dict[str, Any]:
    """What must agree between an adapter and a base, by name, in the words of the error message."""
    image_width, text_width = adapter.extractor.proj.shape
    layers = [attention.to_k.weight.shape[0] for attention in cross_attentions(unet).values()]
    return {"image_channels": image_width, "text_channels": text_width, "cross_attention_channels": layers}


def _folder(path: str) -> Path:
    """Of the adapter itself, where all that `export` wrote is named."""
    inside = Path(path) / SUBFOLDER
    return inside if (inside / CONFIG).is_file() else Path(path)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no style adapter here ({CONFIG} is missing or damaged)") from error
    if not isinstance(config, dict) or config.get("_class_name") != StyleAdapter.__name__ or "size" not in config:
        raise UserError(f"{folder}: its {CONFIG} is not that of a style adapter")
    return config
