"""What StyleCrafter's `predict` is asked for: prompts, styles and tables of both."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lit_gen.data.images import read_picture, to_tensor
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter import StyleCrafter
from lit_gen.methods.stylecrafter_requests import find_styles, mosaic, read_requests, sheets

SIZE = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    for i, name in enumerate(("a/one.png", "a/two.png", "b/one.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 90), (60 * i, 100, 200)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_and_styles_from_files_folders_and_a_table(gallery):
    (gallery / "prompts.txt").write_text("a cone\n\na torus\n")
    (gallery / "b" / "pairs.csv").write_text("prompt,style\na disc, one.png ; ../a\na cone,one.png\n")
    found = read_requests(["a ball", "prompts.txt"], ["a", "b/one.png;a/two.png"], "b/pairs.csv", 64)
    assert [r.name for r in found] == ["one", "two", "one+two", "one+one+two", "one-2"]
    assert [len(r.references) for r in found] == [1, 1, 2, 3, 1]
    every = {0: "a ball", 1: "a cone", 2: "a torus"}
    assert [r.prompts for r in found] == [every, every, every, {3: "a disc"}, {1: "a cone"}]
    assert found[3].references.shape == (3, 3, 64, 64)
    assert torch.equal(found[3].references[0], found[4].references[0])  # b/one.png


def test_every_style_gets_a_name_of_its_own(gallery):
    for name in ("a/one-2.png", "a/one-3.png", "c/one.png"):
        (gallery / name).parent.mkdir(exist_ok=True)
        shutil.copy("a/one.png", name)
    found = read_requests(["a ball"], ["a/one.png", "a/one-3.png", "b/one.png", "a/one-2.png", "c/one.png"], None, 64)
    assert [r.name for r in found] == ["one", "one-3", "one-2", "one-2-2", "one-4"]


def test_a_sheet_has_references_before_and_prompts_above(gallery):
    found = read_requests(["a ball", "a cone"], ["a", "a/one.png;b/one.png"], None, 64)
    drawn = [(r, [torch.full((3, 64, 64), -1.0 + 0.5 * i + 0.2 * j) for j in r.prompts]) for i, r in enumerate(found)]
    (sheet,) = sheets(drawn)
    cell = 128 + 4
    top = sheet.shape[-2] - 3 * cell
    assert sheet.shape == (3, top + 3 * cell, 3 * cell) and top > 0
    for i, (request, samples) in enumerate(drawn):
        row = sheet[:, top + i * cell :][:, :128]
        assert torch.equal(row[:, ::2, :128:2], mosaic(request.references))
        for j, sample in enumerate(samples):
            assert (row[:, :, (j + 1) * cell : (j + 1) * cell + 128] == sample[0, 0, 0]).all()
    assert len(list(sheets(drawn * 5))) == 2  # a page holds 12 styles


@pytest.mark.parametrize(
    "table,message",
    [
        ("prompt,styles\na,b\n", "no column 'style'"),
        ("prompt,style\na ball,\n", "line 2: the style is empty"),
        ("prompt,style\na ball,a/one.png\na cone,gone.png\n", "line 3: style 'gone.png': no such file"),
        ("prompt,style\n", "has no rows"),
        (None, "not a table that can be read"),
    ],
)
def test_tables_with_mistakes_are_one_line(gallery, table, message):
    if table is not None:
        (gallery / "pairs.csv").write_text(table)
    with pytest.raises(UserError, match=message) as caught:
        read_requests([], [], "pairs.csv", 64)
    assert "\n" not in str(caught.value)


def test_references_are_read_as_the_pictures_of_sets_are(gallery):
    upright = Image.new("RGB", (64, 64), "white")
    upright.paste("red", (0, 0, 64, 32))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    folder = gallery / "kinds"
    folder.mkdir()
    upright.rotate(180).save(folder / "exif.jpg", exif=turned, quality=95, subsampling=0)
    for suffix in ("bmp", "gif", "tiff"):
        upright.save(folder / f"plain.{suffix}")
    grey = np.full((64, 64), 65535, np.uint16)
    grey[:32] = 20000
    Image.fromarray(grey).save(folder / "grey.png")
    see_through = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    see_through.paste((255, 0, 0, 255), (0, 0, 64, 32))
    see_through.save(folder / "transparent.png")
    found = {files[0].name: read_picture(files[0], 64) for files in find_styles([str(folder)])}
    assert found.keys() == {"exif.jpg", "plain.bmp", "plain.gif", "plain.tiff", "grey.png", "transparent.png"}
    expected = to_tensor(upright)
    for name, picture in found.items():
        if name == "grey.png":
            assert picture[:, :32].max() == pytest.approx((20000 >> 8) / 127.5 - 1) and picture[:, 32:].min() == 1
        else:
            torch.testing.assert_close(picture, expected, atol=0.1 if name == "exif.jpg" else 0.01, rtol=0)


def test_a_huge_picture_is_one_line(gallery, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="a/one.png' has more than 2,000 pixels"):
        read_requests(["a ball"], ["a/one.png"], None, 64)


def test_other_mistakes_are_one_line(gallery, tiny_base):
    (gallery / "empty").mkdir()
    (gallery / "notes.png").write_text("not a picture")
    for style, message in [("empty", "no pictures"), ("notes.png", "not a picture"), (" ; ", "names no picture")]:
        with pytest.raises(UserError, match=message):
            read_requests(["a ball"], [style], None, 64)
    with pytest.raises(UserError, match="--style"):
        read_requests(["a ball"], [], None, 64)
    with pytest.raises(UserError, match="gone.txt"):
        read_requests(["gone.txt"], ["a"], None, 64)
    with pytest.raises(UserError, match="longer than"):
        StyleCrafter(str(tiny_base), adapter=SIZE, prompts=["red " * 100], styles=["a"]).predict_dataloader()


def test_the_command_line_draws_pairs_and_exports_what_it_trained(lit_gen, universe, gallery, monkeypatch, capsys):
    (gallery / "pairs.csv").write_text("prompt,style\na red ball,a/one.png;b/one.png\na cone,a/two.png\n")
    (gallery / "notes.png").write_text("not a picture")
    monkeypatch.chdir(universe)
    smoke = ("-c", "experiments/stylecrafter.yaml", "--smoke", "--stage", "adapter")
    words = (*smoke, "--trainer.accelerator", "cpu")
    assert lit_gen("fit", *words) == 0
    more = ("--trainer.limit_predict_batches", "2")  # than a smoke run draws
    assert lit_gen("predict", *words, *more, "--model.pairs", gallery / "pairs.csv") == 0
    drawn = Path("runs/smoke/stylecrafter/adapter/samples/predict")
    assert {p.name for p in drawn.iterdir()} == {"one+one-00.png", "two-01.png", "contact-sheet.png"}
    assert lit_gen("export", *smoke, "--out", str(gallery / "out")) == 0
    capsys.readouterr()
    assert lit_gen("predict", *words, "--prompt", "a ball", "--style", gallery / "notes.png") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "notes.png' is not a picture" in line
    weights = load_file(gallery / "out" / "adapter" / "model.safetensors")
    again = StyleCrafter("data/world-base", adapter_weights=str(gallery / "out"))
    assert all(torch.equal(weights[name], own) for name, own in again.adapter.state_dict().items())
