"""Pictures edited by a tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_gen.callbacks.samples import save
from lit_gen.errors import UserError
from lit_gen.methods.asd_edit import Edit, Edits, psnr
from lit_gen.metrics import scores
from lit_gen.metrics.counterparts import CHANGES, WorldEdits
from lit_gen.world.render import render

Command = Callable[..., int]


def settings(base: Path, **more: object) -> dict:
    return {
        "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None},
        "model": {
            "class_path": "lit_gen.methods.asd_edit.Edits",
            "init_args": {"base": str(base), "world": {"count": 3}, **more},
        },
    }


@pytest.mark.parametrize(
    "more",
    [
        *({"sibling": s} for s in ("asd", "dds", "cds", "sds")),
        {"kind": "embedding"},
        *({"sibling": s, "frozen_dtype": "bfloat16"} for s in ("asd", "cds")),
    ],
    ids=str,
)
def test_a_run_moves_the_pictures_and_draws_them(lit_gen: Command, tiny_base: Path, here: Path, more: dict) -> None:
    (here / "x.yaml").write_text(yaml.safe_dump(settings(tiny_base, **more)))
    assert lit_gen("fit", "-c", "x.yaml", "--trainer.callbacks+", "lit_gen.callbacks.samples.Samples") == 0
    weights = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = Edits(str(tiny_base), world=WorldEdits(3)).latents
    assert weights["latents"].shape == start.shape and not torch.equal(weights["latents"], start)
    assert list(Path("runs/x/samples").glob("step-000003/edits.png"))
    assert "psnr" in json.loads(Path("runs/x/metrics.json").read_text())["validate"]
    assert lit_gen("test", "-c", "x.yaml") == 0
    assert len(scores.read(Path("runs/x"))["psnr"]) == 3


def test_scores_of_edits_to_the_same_text_stand_side_by_side(tiny_base: Path) -> None:
    model = Edits(str(tiny_base), world=WorldEdits(2), sibling="sds")
    model.targets, model.log_dict = ["a ball"] * 2, lambda *_, **__: None
    model.validation_step(torch.arange(2), 0)
    assert [*model.scores.values["psnr"]] == ["00 a ball", "01 a ball"]


def test_trained_edits_are_not_taken_for_others(tiny_base: Path, here: Path) -> None:
    """Whatever the files are called: what counts is the picture, and both prompts."""
    for name, value in (("a", 0.0), ("b", 0.5)):
        save(here / name, torch.full((3, 64, 64), value))

    def edits(source: str, target: str = "a cube") -> Edits:
        return Edits(str(tiny_base), [Edit(str(here / source), "a ball", target)], sibling="sds")

    checkpoint: dict = {"state_dict": {}}
    edits("a.png").on_save_checkpoint(checkpoint)
    (here / "a.png").rename(here / "c.png")
    edits("c.png").on_load_checkpoint(checkpoint)
    for other in (edits("b.png"), edits("c.png", "a cone")):
        with pytest.raises(UserError, match="pictures are of picture .* from 'a ball' to 'a cube' .*, not"):
            other.on_load_checkpoint(checkpoint)


def test_a_discriminator_that_runs_away_is_told_once(
    lit_gen: Command, tiny_base: Path, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gen.distillation.method.RUNAWAY", 1e-6)
    wild = settings(tiny_base, discriminator_lr=1.0)
    wild["trainer"] |= {"max_steps": 6, "val_check_interval": 6, "log_every_n_steps": 1}
    (here / "x.yaml").write_text(yaml.safe_dump(wild))
    assert lit_gen("fit", "-c", "x.yaml") == 0
    assert capsys.readouterr().out.count("times the teacher's length away") == 1


def test_an_edit_of_nothing_moves_nothing(tiny_base: Path, here: Path) -> None:
    """Delta denoising asks for no change where both prompts are the same, and momentum descent then makes none."""
    save(here / "a", render(WorldEdits(1).draw()[2]).rgb[0] * 2 - 1)
    model = Edits(str(tiny_base), [Edit(str(here / "a.png"), "a ball", "a ball")], sibling="dds")
    optimizer = torch.optim.AdamW(model.parameter_groups(), weight_decay=0.0, betas=(0.0, 0.99))
    model.distillation.source = model.start
    text = {"target": model.target, "null": model.null, "source": model.source}
    from lit_gen.distillation.contract import Prompts

    model.distillation(model.latents, Prompts(**text)).total.backward()
    optimizer.step()
    assert torch.equal(model.latents.detach(), model.start)
    model.latents.grad = torch.randn_like(model.latents) * 0.1
    optimizer.step()
    moved = (model.start - model.latents.detach()) / model.latents.grad
    assert moved.std() < 0.01 * moved.mean() and moved.mean() == pytest.approx(0.05, rel=0.01)


def test_edits_of_the_world_change_one_attribute() -> None:
    prompts, targets, before, after, changed = WorldEdits(24).draw()
    assert changed == [*CHANGES] * 8
    for i, change in enumerate(changed):
        differ = [
            name
            for name, (column, _) in CHANGES.items()
            if getattr(before, column)[i, 0] != getattr(after, column)[i, 0]
        ]
        assert differ == [change] and prompts[i] != targets[i]
    assert torch.equal(before.position, after.position)
    assert (psnr(render(before).rgb * 2 - 1, render(after).rgb * 2 - 1) < 40).all()


def test_a_run_of_a_table(lit_gen: Command, tiny_base: Path, here: Path) -> None:
    for name, value in (("a", 0.0), ("b", 0.5)):
        save(here / name, torch.full((3, 64, 64), value))
    (here / "edits.csv").write_text("source,prompt,target\na.png,a ball,a cube\nb.png,a ball,a cone\n")
    (here / "x.yaml").write_text(yaml.safe_dump(settings(tiny_base)))
    words = ("-c", "x.yaml", "--model.table", "edits.csv")
    assert lit_gen("fit", *words) == 0 and lit_gen("predict", *words) == 0
    assert {file.name for file in Path("runs/x/samples/predict").glob("0?.png")} == {"00.png", "01.png"}


def test_a_table_of_edits(tiny_base: Path, here: Path) -> None:
    save(here / "a", torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="not both"):
        Edits(str(tiny_base), [Edit("a.png", "a ball", "a cube")], "edits.csv")
    (here / "edits.csv").write_text("source,prompt,target\na.png,a ball,a cube\na.png, a ball, a cone\n")
    model = Edits(str(tiny_base), table=str(here / "edits.csv"))
    assert model.targets == ["a cube", "a cone"] and model.originals.shape == (2, 3, 64, 64)
    for text, message in (
        ("source,prompt\na.png,a ball\n", "no column 'target'"),
        ("source,prompt,target\na.png,a ball,\n", "line 2: the target is empty"),
        ("source,prompt,target\nb.png,a ball,a cube\n", "line 2: source .* no such file"),
        ("source,prompt,target\n", "there are none"),
    ):
        (here / "edits.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            Edits(str(tiny_base), table=str(here / "edits.csv"))
    (here / "note.png").write_text("no picture")
    with pytest.raises(UserError, match="source .* is not a picture"):
        Edits(str(tiny_base), [Edit(str(here / "note.png"), "a", "b")])
