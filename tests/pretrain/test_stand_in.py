"""The base of real size is of the real size."""

from __future__ import annotations

import torch

from lit_gen.pretrain.stand_in import sd15_parts


def test_networks_have_as_many_weights_as_the_released_ones() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build().parameters()) for name, build in sd15_parts().items()}
    assert sizes == {
        "text_encoder": 123_060_480,
        "image_encoder": 632_076_800,
        "vae": 83_653_863,
        "unet": 859_520_964,
        "motion_adapter": 453_209_280,
    }
