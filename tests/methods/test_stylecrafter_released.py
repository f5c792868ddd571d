"""StyleCrafter's released weights in use: from the command line, without any training."""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from test_readme import commands
from test_stylecrafter_use import sd2_unet
from test_stylecrafter_weights import (
    TINY_SDXL_SHAPES,
    TINY_SDXL_SIZE,
    TINY_SIZE,
    TINY_VIDEOCRAFTER_SHAPES,
    real_places,
    sdxl_shapes,
    videocrafter_shapes,
)

from lit_gen import experiment
from lit_gen.data.sets import SetFile
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.style_adapter import SDXL, VIDEOCRAFTER, Adapter, StyleAdapter
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter_weights import released_size, write_adapter, write_temporal

ROOT = Path(__file__).parents[2]
SMALL = ("--trainer.accelerator", "cpu", "--trainer.precision", "32", "--model.frozen_dtype", "float32", "--smoke")
SMALL_CLIPS = ("--model.frames", "2", "--model.video_sampling.size", "[32, 32]", "--model.image_encoder", "null")


@pytest.fixture(scope="module")
def released(universe, tmp_path_factory):
    """A base of the kind of Stable Diffusion 2.x, and files in the released layouts that fit it."""
    folder = tmp_path_factory.mktemp("released")
    base = folder / "base"
    shutil.copytree(universe / "data" / "world-base", base, ignore=shutil.ignore_patterns("unet", "motion_adapter"))
    torch.manual_seed(0)
    sd2_unet().save_pretrained(base / "unet")
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
    assert lit_gen("export", *run, "--model.adapter_weights", "gone.pth") == 2
    assert capsys.readouterr().err == "error: gone.pth: no such file\n"

    here = Path("runs/smoke/from_released/adapter/checkpoints/last.ckpt")
    here.parent.mkdir(parents=True)
    here.write_bytes(b"")
    asked = ("--prompt", "a ball", "--style", str(released / "painting.png"))
    given = ("--ckpt_path", str(here))
    for words in (("predict", *asked), ("predict", *asked, *given), ("export", *given)):
        assert lit_gen(*words, *run, *weights) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "would replace what model.adapter_weights gives" in line


@pytest.mark.parametrize("name, size", [("videocrafter", VIDEOCRAFTER), ("sdxl", SDXL)])
def test_the_overlays_ask_for_the_released_sizes(name, size):
    files = [str(ROOT / "experiments" / file) for file in ("stylecrafter.yaml", f"scale/{name}.yaml")]
    runs = experiment.runs(files, [])
    assert [run.folder.name for run in runs] == ["adapter", "temporal"][: 1 + (name == "videocrafter")]
    for run in runs:
        settings = run.settings.data["model"]["init_args"]
        assert Adapter(**settings["adapter"]) == size
        assert not settings.get("motion")  # VideoCrafter1's checkpoint has its own, SDXL none
    if name == "videocrafter":
        videos = runs[1].settings.data["data"]["init_args"]["videos"]["init_args"]
        assert settings["frames"] == videos["frames"] == SetFile.read(ROOT / videos["train"]).frames == 16
        assert settings["video_sampling"]["size"] == videos["size"] == [320, 512]


# -- sizes -------------------------------------------------------------------------------------------------------------

REAL_SDXL = sdxl_shapes(1280, 2048, 16, 4, 2, 512, [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10)
REAL_VIDEOCRAFTER = videocrafter_shapes(1280, 1024, 8, 3, 2, real_places())


def outlined(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "shapes,size,kind",
    [(REAL_VIDEOCRAFTER, VIDEOCRAFTER, "VideoCrafter1"), (REAL_SDXL, SDXL, "StyleCrafter-SDXL")],
    ids=["VideoCrafter1", "SDXL"],
)
def test_released_layouts_tell_their_size_and_refuse_settings_that_contradict(shapes, size, kind, caplog):
    state = outlined(shapes)
    assert released_size(state, Adapter(), "file.pth") == size
    assert (kind in caplog.text) == (size != Adapter()) and len(caplog.records) <= 1
    caplog.clear()
    assert released_size(state, size, "file.pth") == size and not caplog.text
    for wrong in ({"image_layer": -3}, {"heads": 2}, {"tokens": 5}, {"fusion": "appended"}, {"predictor_width": 7}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"file.pth: an adapter for {kind} .*model.adapter.{name} is") as caught:
            released_size(state, Adapter(**wrong), "file.pth")
        assert "\n" not in str(caught.value)
    # as many heads as the extractor is what null says
    assert released_size(state, Adapter(predictor_heads=8), "file.pth") == size


def test_layouts_of_small_adapters_leave_the_heads_to_the_settings():
    for shapes, size in ((TINY_VIDEOCRAFTER_SHAPES, TINY_SIZE), (TINY_SDXL_SHAPES, TINY_SDXL_SIZE)):
        given = Adapter(heads=size.heads, predictor_heads=size.predictor_heads, image_layer=size.image_layer)
        assert released_size(outlined(shapes), given) == size
