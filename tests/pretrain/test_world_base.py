"""The bundled base: within its size, ordinary diffusers folders, and good enough to be believed."""

from pathlib import Path

import pytest
import torch

from lit_gen.metrics.oracle import Oracle
from lit_gen.metrics.prompt import PromptAccuracy
from lit_gen.pretrain.evaluate import Painter
from lit_gen.world.grammar import captions
from lit_gen.world.render import render
from lit_gen.world.sampling import sample

BASE = Path(__file__).parents[2] / "data" / "world-base"
MIB = 2**20


def test_sizes() -> None:
    sizes = [f.stat().st_size for f in BASE.rglob("*") if f.is_file()]
    assert max(sizes) <= 16 * MIB
    assert sum(sizes) <= 36 * MIB


def test_autoencoder_keeps_patterns() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    images = render(sample("photo", "test", 5, torch.arange(24))).rgb * 2 - 1
    with torch.no_grad():
        restored = vae(images).sample.clamp(-1, 1)
    psnr = -10 * torch.log10((restored - images).square().mean((1, 2, 3)) / 4)
    assert psnr.mean() >= 30


def test_pictures_show_their_prompts() -> None:
    scenes = sample("objects", "test", 6, torch.arange(16))
    said = captions(scenes)
    pictures = Painter(str(BASE), "cpu", guidance=4.0, steps=12).images([c.text for c in said])
    accuracy = PromptAccuracy(Oracle.from_pretrained(BASE.parent / "oracle"))
    accuracy.update(pictures, scenes, said)
    figures = accuracy.compute()
    # far above chance (1 in 10, 1 in 8), far below the card's figures: 16 pictures of 12 steps are a coarse measure
    assert figures["shape"] >= 0.75
    assert figures["colour"] >= 0.75


@pytest.mark.filterwarnings("ignore")
def test_diffusers_pipelines_run_on_it_unchanged() -> None:
    from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(BASE))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red ball", num_inference_steps=8, guidance_scale=4.0, output_type="pt").images[0]
    assert picture.shape == (3, 64, 64)
    reading = Oracle.from_pretrained(BASE.parent / "oracle").read(picture[None] * 2 - 1)
    assert reading.count.item() >= 1
    motion = MotionAdapter.from_pretrained(BASE / "motion_adapter")
    film = AnimateDiffPipeline.from_pretrained(str(BASE), motion_adapter=motion)
    film.set_progress_bar_config(disable=True)
    frames = film("a red ball jumps", num_frames=8, height=64, width=64, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 8, 64, 64, 3)
