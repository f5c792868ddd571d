"""The frozen models under StyleCrafter: which parts each stage loads, and the precision they are kept in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lit_gen.diffusion.base import PIPELINE_PARTS, Base, load_base
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter_files import fingerprint, image_fingerprint


def load(
    base: str, stage: str, motion: str | None, image_encoder: str | None, config: str | None, temporal: str | None
) -> Base:
    """The parts of a base that a stage needs.

    Raises:
        UserError: they are not there, or the stage cannot have this base.
    """
    if stage == "adapter" and temporal:
        raise UserError('model.temporal_weights are of no use in stage "adapter", which has no temporal layers')
    if motion and temporal:
        raise UserError(
            f"model.motion ({motion}) and model.temporal_weights both say where the temporal layers come from; "
            "--model.motion null leaves the former out"
        )
    refusal = UserError(
        f'base {base!r} is of the SDXL kind, which has no temporal layers: it can only be in stage "adapter"'
    )
    if stage != "adapter" and (Path(base) / "text_encoder_2").is_dir():
        raise refusal
    moves = stage != "adapter" and not temporal  # else fresh layers take the released weights
    parts = (*PIPELINE_PARTS, "image_encoder", *(["motion_adapter"] if moves else []))
    loaded = load_base(base, motion if moves else None, parts, image_encoder=image_encoder, config=config)
    if stage != "adapter" and loaded.text_encoder_2 is not None:
        raise refusal
    return loaded


def keep_frozen_in(dtype: torch.dtype, base: Base, motion_unet: nn.Module | None) -> None:
    """Lower the precision of the frozen weights of the UNet and the encoders, once all that is trained is marked.

    Mixed precision casts frozen float32 weights anew in every step. The autoencoder keeps its own: it overflows.

    Args:
        dtype: to keep them in.
        base: whose parts they are.
        motion_unet: over the UNet, with temporal layers; None for none.
    """
    if next(base.unet.parameters()).device.type != "meta":  # an adapter names the weights it was trained for
        base.fingerprint, base.image_fingerprint = fingerprint(base.unet), image_fingerprint(base.image_encoder)
    for part in (base.unet, motion_unet, base.text_encoder, base.text_encoder_2, base.image_encoder):
        for weight in () if part is None else part.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(dtype)
