"""Video from an image model: motion modules over a 2D UNet's own layers."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from lit_gen.diffusion.base import quietly
from lit_gen.diffusion.videocrafter import TemporalLayers, VideoUNet
from lit_gen.errors import UserError

SPATIAL = ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out")
SPATIAL_IN_BLOCK = ("resnets", "attentions", "downsamplers", "upsamplers")


def motion_unet(unet: UNet2DConditionModel, adapter: MotionAdapter | TemporalLayers) -> UNetMotionModel | VideoUNet:
    """A UNet for clips B C F h w whose spatial layers *are* those of `unet`, with the adapter's motion modules between.

    Sharing saves a copy of the weights, and lets one set of attention processors serve both: pictures go through `unet`
    and truly skip the temporal layers, clips go through the result.

    Raises:
        UserError: the adapter was made for another UNet.
    """
    if isinstance(adapter, TemporalLayers):
        return _video_unet(unet, adapter)
    try:
        with quietly():
            motion = UNetMotionModel.from_unet2d(unet, adapter)
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the motion adapter does not fit this base's UNet: {first}") from error
    for name in SPATIAL:
        setattr(motion, name, getattr(unet, name))
    pairs = [
        *zip(motion.down_blocks, unet.down_blocks, strict=True),
        *zip(motion.up_blocks, unet.up_blocks, strict=True),
    ]
    for theirs, ours in [*pairs, (motion.mid_block, unet.mid_block)]:
        for name in SPATIAL_IN_BLOCK:
            if getattr(ours, name, None) is not None:
                setattr(theirs, name, getattr(ours, name))
    for modules in motion_modules(motion):
        for module in modules:
            module.norm.register_forward_pre_hook(_contiguous)
    return motion.to(unet.device).requires_grad_(False).eval()


def _video_unet(unet: UNet2DConditionModel, layers: TemporalLayers) -> VideoUNet:
    own = TemporalLayers.places_of(unet)
    if layers.config.places != own:
        wrong = next(p for p in {**own, **layers.config.places} if own.get(p) != layers.config.places.get(p))
        sizes = f"{layers.config.places.get(wrong)} for {own.get(wrong)}"
        raise UserError(
            f"the temporal layers do not fit this base's UNet: {wrong} has [channels, heads, width] {sizes}"
        )
    return VideoUNet(unet, layers).to(unet.device).requires_grad_(False).eval()


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # On CPUs torch 2.13 crashes in the backward pass of a channels_last GroupNorm over clips whose input needs no
    # gradient, which is the case of the first motion module behind frozen layers.
    return tuple(x.contiguous() for x in inputs)


def motion_modules(unet: UNetMotionModel | VideoUNet) -> Iterator[nn.Module]:
    """The temporal layers, by whatever block they are in."""
    for name, module in unet.named_modules():
        if name.endswith("motion_modules"):
            yield module
