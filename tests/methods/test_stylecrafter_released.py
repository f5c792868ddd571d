"""StyleCrafter's released weights in use: from the command line, without any training."""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from test_readme import commands

from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.style_adapter import Adapter, StyleAdapter
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.methods.stylecrafter_weights import write_adapter, write_temporal

SMALL = ("--trainer.accelerator", "cpu", "--trainer.precision", "32", "--model.frozen_dtype", "float32", "--smoke")
SMALL_CLIPS = ("--model.frames", "2", "--model.video_sampling.size", "[32, 32]", "--model.image_encoder", "null")


@pytest.fixture(scope="module")
def released(universe, tmp_path_factory):
    """A base of the kind of Stable Diffusion 2.x, and files in the released layouts that fit it."""
    folder = tmp_path_factory.mktemp("released")
    base = folder / "base"
    shutil.copytree(universe / "data" / "world-base", base, ignore=shutil.ignore_patterns("unet", "motion_adapter"))
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    ).save_pretrained(base / "unet")
    unet = load_base(str(base), parts=("unet",)).unet
    write_adapter(folder / "adapter_v1.pth", StyleAdapter(unet, 32, Adapter(4, 2, 1)), unet)
    write_temporal(folder / "temporal_v1.pth", TemporalLayers.for_unet(unet))
    Image.new("RGB", (80, 64), "teal").save(folder / "painting.png")
    return folder


def in_readme(released, *more):
    """The README's command with small files."""
    (command,) = [c for c in commands() if "model.ckpt" in c]
    files = {"model.ckpt": "base"} | {n: n for n in ("adapter_v1.pth", "temporal_v1.pth", "painting.png")}
    words = [str(released / files[word]) if word in files else word for word in command]
    return [*words, *SMALL, *SMALL_CLIPS, *more]


def test_the_command_of_the_readme_draws_a_clip_without_training(lit_gen, universe, released, monkeypatch, caplog):
    monkeypatch.chdir(universe)
    assert lit_gen(*in_readme(released)) == 0
    drawn = Path("runs/smoke/stylecrafter-videocrafter/temporal/samples/predict")
    assert {p.name for p in drawn.iterdir()} == {"painting-00.mp4", "contact-sheet.mp4"}
    with av.open(str(drawn / "painting-00.mp4")) as clip:
        assert clip.streams.video[0].average_rate == 10
    (line,) = [r.getMessage() for r in caplog.records if "an adapter for" in r.getMessage()]
    assert "VideoCrafter1; model.adapter now has tokens 4, extractor_layers 2, predictor_layers 1" in line
    assert "not trained" not in caplog.text


def test_released_weights_are_exported_and_a_checkpoint_is_not_mixed_with_them(
    lit_gen, universe, released, monkeypatch, capsys
):
    monkeypatch.chdir(universe)
    weights = ("--model.adapter_weights", str(released / "adapter_v1.pth"))
    run = ("-c", "experiments/stylecrafter.yaml", "--stage", "adapter", "--experiment", "from_released")
    run += ("--model.base", str(released / "base"), "--smoke")
    assert lit_gen("export", *run, *weights, "--out", str(released / "out")) == 0
    assert json.loads((released / "out/adapter/config.json").read_text())["size"]["tokens"] == 4
    assert not (released / "out/weights.safetensors").exists()
    assert lit_gen("export", *run) == 2 and "run `fit` first" in capsys.readouterr().err

    here = Path("runs/smoke/from_released/adapter/checkpoints/last.ckpt")
    here.parent.mkdir(parents=True)
    here.write_bytes(b"")
    asked = ("--prompt", "a ball", "--style", str(released / "painting.png"))
    given = ("--ckpt_path", str(here))
    for words in (("predict", *asked), ("predict", *asked, *given), ("export", *given)):
        assert lit_gen(*words, *run, *weights) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "would replace what model.adapter_weights gives" in line
