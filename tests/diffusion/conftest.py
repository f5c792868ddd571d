import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture(autouse=True)
def seeded():
    """The same random inputs in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sd2_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose UNet is built like Stable Diffusion 2.x's: linear projections, no attention at the bottom."""
    folder = tmp_path_factory.mktemp("sd2") / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("unet", "motion_adapter"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
        ).save_pretrained(folder / "unet")
    return folder
