"""StyleCrafter's released weights: `adapter_v1.pth`, `temporal_v1.pth` and `stylecrafter_sdxl.ckpt`, read and written.

The adapter for VideoCrafter1 names its style layers by the place in the original UNet and numbers their scales in the
order of execution. The one for SDXL names and numbers them in the order of `unet.attn_processors`, which has the middle
block last; here both are in the order of execution, so the queries of its scale predictor change places.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_gen.diffusion.attention import cross_attentions
from lit_gen.diffusion.image_prompt import ProjectedScalePredictor
from lit_gen.diffusion.original_layout import original_name, read_weights, require_same, temporal_name
from lit_gen.diffusion.style_adapter import SDXL, VIDEOCRAFTER, Adapter, StyleAdapter
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.errors import UserError

log = logging.getLogger(__name__)
RELEASED_WIDTH = 1280  # of the image tokens, those of CLIP ViT-H/14
SCALE_QUERIES = "predictor.transformer.queries"
# Ours to theirs; the first that fits the beginning of a name.
_VIDEOCRAFTER = (
    ("extractor.transformer.queries", "image_context_model.style_emb"),
    ("extractor.transformer.", "image_context_model."),
    ("extractor.", "image_context_model."),
    (SCALE_QUERIES, "scale_predictor.scale_emb"),
    ("predictor.transformer.", "scale_predictor."),
    ("predictor.", "scale_predictor."),
)
_SDXL = (
    ("extractor.transformer.queries", "image_context_model.query_emb"),
    ("extractor.transformer.", "image_context_model."),
    ("extractor.", "image_context_model."),
    (SCALE_QUERIES, "scale_predictor.scale_predictor.query_emb"),
    ("predictor.transformer.", "scale_predictor.scale_predictor."),
    ("predictor.proj", "scale_predictor.scale_predictor.proj"),
    ("predictor.out.", "scale_predictor.out_proj."),
    ("predictor.", "scale_predictor."),
)
_BLOCK = {".blocks.": ".transformer_blocks.resblocks.", ".mlp.0.": ".mlp.c_fc.", ".mlp.2.": ".mlp.c_proj."}


def released_size(state: Mapping[str, Any], given: Adapter, what: str = "adapter") -> Adapter:
    """The size of released weights: what shapes tell comes from them, the rest is known of each variant.

    Of weights for an image encoder of another width than the released ones, which `export` can write, the heads and the
    encoder's layer are those of `given`.

    Args:
        state: weights by their released names, or anything with a `shape` in their place.
        given: settings; those that are the defaults count as not made.
        what: the weights are, for messages.

    Raises:
        UserError: the settings contradict the weights.
    """
    sdxl = "image_context_model.query_emb" in state
    kind, variant = ("StyleCrafter-SDXL", SDXL) if sdxl else ("VideoCrafter1", VIDEOCRAFTER)
    predictor = "scale_predictor.scale_predictor." if sdxl else "scale_predictor."
    try:
        _, tokens, width = state[f"image_context_model.{'query' if sdxl else 'style'}_emb"].shape
        inner = state["scale_predictor.text_proj.weight"].shape[0] if sdxl else None
    except (KeyError, ValueError, AttributeError):
        return given  # whatever is wrong with them is said when they are loaded
    known: dict[str, Any] = {
        "tokens": tokens,
        "extractor_layers": _blocks(state, "image_context_model."),
        "predictor_layers": _blocks(state, predictor),
        "predictor_width": inner,
        "fixed_scale": None,
        "fusion": "dual",
    }
    if width == RELEASED_WIDTH:
        known |= {name: getattr(variant, name) for name in ("heads", "predictor_heads", "image_layer")}
    fine = {name: (getattr(Adapter(), name), value) for name, value in known.items()}
    if known.get("predictor_heads", ...) is None:  # as many as `heads`
        fine["predictor_heads"] += (known["heads"],)
    if wrong := [name for name, values in fine.items() if getattr(given, name) not in values]:
        told = ", ".join(f"{n} {known[n]} (model.adapter.{n} is {getattr(given, n)})" for n in wrong)
        raise UserError(f"{what}: an adapter for {kind} has {told}; leave these settings out, or make them so")
    if changed := [f"{name} {value}" for name, value in known.items() if getattr(given, name) != value]:
        log.warning("%s: an adapter for %s; model.adapter now has %s", what, kind, ", ".join(changed))
    return dataclasses.replace(given, **known)


def _blocks(state: Mapping[str, Any], prefix: str) -> int:
    prefix += "transformer_blocks.resblocks."
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def official_adapter(adapter: StyleAdapter, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter's weights under their released names: those for SDXL if its predictor projects, as SDXL's does.

    Args:
        adapter: of either variant.
        unet: that it styles.
    """
    state = adapter.state_dict()
    if _is_sdxl(adapter):
        state[SCALE_QUERIES] = state[SCALE_QUERIES][:, torch.tensor(_enumerated_order(unet)).argsort()]
    return {theirs: state[ours] for theirs, ours in _names(adapter, unet).items()}


def load_official_adapter(
    adapter: StyleAdapter, unet: UNet2DConditionModel, state: Mapping[str, Any], what: str = "adapter"
) -> None:
    """Give the adapter released weights.

    Args:
        adapter: of the variant and the size of the weights.
        unet: that it styles.
        state: weights by their released names.
        what: they are, for error messages.

    Raises:
        UserError: weights are missing, unknown or of another shape.
    """
    names = _names(adapter, unet)
    own = adapter.state_dict()
    require_same(state, {theirs: own[ours] for theirs, ours in names.items()}, f"{what} does not fit this base")
    weights = {ours: state[theirs] for theirs, ours in names.items()}
    if _is_sdxl(adapter):
        weights[SCALE_QUERIES] = weights[SCALE_QUERIES][:, _enumerated_order(unet)]
    adapter.load_state_dict(weights)


def read_adapter(path: str | Path, adapter: StyleAdapter, unet: UNet2DConditionModel) -> None:
    """`load_official_adapter` from `adapter_v1.pth` or `stylecrafter_sdxl.ckpt`."""
    load_official_adapter(adapter, unet, read_weights(path), str(path))


def write_adapter(path: str | Path, adapter: StyleAdapter, unet: UNet2DConditionModel) -> None:
    """A file that the released code reads."""
    torch.save({k: v.detach().cpu().clone() for k, v in official_adapter(adapter, unet).items()}, path)


def official_temporal(layers: TemporalLayers) -> dict[str, dict[str, Tensor]]:
    """Weights of each temporal layer by its released name, as `temporal_v1.pth` has them."""
    per_block = layers.config.layers_per_block
    return {temporal_name(place, per_block): layers[place].state_dict() for place in layers.config.places}


def load_official_temporal(
    layers: TemporalLayers, state: Mapping[str, Mapping[str, Any]], what: str = "temporal layers"
) -> None:
    """Give temporal layers released weights.

    Args:
        layers: of the size of the weights.
        state: weights of each layer by its released name.
        what: they are, for error messages.

    Raises:
        UserError: layers or weights are missing, unknown or of another shape.
    """
    flat = [name for name, weights in state.items() if not isinstance(weights, Mapping)]
    if flat:
        raise UserError(f"{what}: {len(flat)} entries are no temporal layers with their weights, e.g. {flat[0]}")
    own = official_temporal(layers)
    require_same(_flat(state), _flat(own), f"{what} does not fit this base")
    for place in layers.config.places:
        layers[place].load_state_dict(state[temporal_name(place, layers.config.layers_per_block)])


def read_temporal(path: str | Path, layers: TemporalLayers) -> None:
    """`load_official_temporal` from `temporal_v1.pth` or `temporal_v1_1.pth`."""
    load_official_temporal(layers, read_weights(path), str(path))


def write_temporal(path: str | Path, layers: TemporalLayers) -> None:
    """A file that the released code reads."""
    official = official_temporal(layers)
    torch.save({m: {k: v.detach().cpu().clone() for k, v in s.items()} for m, s in official.items()}, path)


def _flat(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{module}.{name}": value for module, weights in state.items() for name, value in weights.items()}


def _is_sdxl(adapter: StyleAdapter) -> bool:
    return isinstance(adapter.predictor, ProjectedScalePredictor)


def _names(adapter: StyleAdapter, unet: UNet2DConditionModel) -> dict[str, str]:
    """Our name of every weight by its released one.

    Raises:
        UserError: an ablation, which no released file holds.
    """
    if adapter.predictor is None:
        raise UserError("adapters with fusion: appended or a fixed_scale are not in the released layout")
    layers = _sdxl_layers(unet) if _is_sdxl(adapter) else _videocrafter_layers(unet)
    prefixes = _SDXL if _is_sdxl(adapter) else _VIDEOCRAFTER
    names = {}
    for ours in adapter.state_dict():
        first, *rest = ours.split(".", 2)
        if first == "layers":
            theirs = f"kv_attn_layers.{layers[int(rest[0])]}.{rest[1]}"
        else:
            theirs = next(new + ours.removeprefix(old) for old, new in prefixes if ours.startswith(old))
            for old, new in _BLOCK.items():
                theirs = theirs.replace(old, new)
        names[theirs] = ours
    return names


def _videocrafter_layers(unet: UNet2DConditionModel) -> list[str]:
    """Released names of the style layers, in execution order: paths in the original UNet without dots."""
    per_block = unet.config.layers_per_block
    return [original_name(f"{name}.processor", per_block).replace(".", "_") for name in cross_attentions(unet)]


def _sdxl_layers(unet: UNet2DConditionModel) -> list[int]:
    """Released numbers of the style layers, in execution order: places among all processors, self-attention's too."""
    processors = list(unet.attn_processors)
    return [processors.index(f"{name}.processor") for name in cross_attentions(unet)]


def _enumerated_order(unet: UNet2DConditionModel) -> list[int]:
    """For each cross-attention, in execution order, its place among them in `unet.attn_processors`."""
    places = _sdxl_layers(unet)
    return [sorted(places).index(place) for place in places]
