"""Motion modules, alone and with the layers between which they stand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from lit_gen.data.together import Both, PicturesAndClips
from lit_gen.data.world import Draws, RenderedWorld
from lit_gen.errors import UserError
from lit_gen.pretrain.motion import Motion
from lit_gen.pretrain.text_to_image import Text


def world(base: Path, **more: object) -> RenderedWorld:
    return RenderedWorld(
        **{"batch_size": 4, "val_pool": 4, "captions": 1, "workers": 0, "tokenizer": str(base / "tokenizer")},
        autoencoder=str(base / "vae"),
        **more,
    )


def fit(base: Path, spatial_lr: float | None) -> Motion:
    L.seed_everything(0)
    model = Motion(str(base), spatial_lr=spatial_lr, sample_steps=0, export=str(base))
    data: L.LightningDataModule = world(base, recipes={"motion": 1.0}, frames=8, pool=8)
    if spatial_lr:
        data = PicturesAndClips(data, world(base, pool=16, clip=str(base)))
    quiet = {f"enable_{n}": False for n in ("checkpointing", "progress_bar", "model_summary")} | {"logger": False}
    L.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, **quiet).fit(model, datamodule=data)
    return model


def weights(base: Path) -> dict[str, torch.Tensor]:
    files = [f for part in ("unet", "text_encoder", "motion_adapter") for f in (base / part).glob("*.safetensors")]
    return {f"{f.parent.name}/{name}": w for f in files for name, w in load_file(f).items()}


@pytest.mark.parametrize("spatial_lr", [None, 1e-3])
def test_what_learns_is_exported(tiny_base: Path, tmp_path: Path, spatial_lr: float | None) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    before = weights(base)
    model = fit(base, spatial_lr)
    after = weights(base)
    assert after.keys() >= before.keys()
    moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({"motion_adapter"} if spatial_lr is None else {"unet", "text_encoder", "motion_adapter"})
    groups = [{id(p) for p in group["params"]} for group in model.optimizers().param_groups]
    assert len(groups) == (1 if spatial_lr is None else 2) and sum(map(len, groups)) == len(set().union(*groups))
    assert set().union(*groups) == {id(p) for p in model.trainable_parameters()}
    # one set of layers, whichever way it is called
    assert {id(p) for p in model.picture_unet.parameters()} <= {id(p) for p in model.unet.parameters()}


def test_both_kinds_of_batches_resume_together() -> None:
    def loader() -> Both:
        return Both(Draws(8, 2, seed=1), Draws(20, 3, seed=2))

    def take(both: Both, batches: int) -> list:
        found: list = []
        while len(found) < batches:
            for batch in both:
                found.append({name: part["rows"].tolist() for name, part in batch.items()})
                if len(found) == batches:
                    break
        return found

    straight = take(loader(), 11)
    for stop in (1, 4, 5):
        first, second = loader(), loader()
        seen = take(first, stop)
        second.load_state_dict(first.state_dict())
        assert seen + take(second, 11 - stop) == straight


def test_words_set_apart_are_two_again_and_nothing_else_changes(tiny_base: Path) -> None:
    before, after = Text(str(tiny_base)), Text(str(tiny_base), apart=[["left", "right"]])
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    (left,), (right,) = tokenizer(["left", "right"], add_special_tokens=False).input_ids
    old, new = (text.encoder.get_input_embeddings().weight.detach() for text in (before, after))
    torch.testing.assert_close(new[left] @ new[right], torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(new[left] + new[right], old[left] + old[right])
    assert (new[left] - new[right]).norm() > 0
    others = torch.tensor([i for i in range(len(old)) if i not in (left, right)])
    assert torch.equal(new[others], old[others])


@pytest.mark.parametrize("pair", [["left"], ["left", "right of"], ["left", "leeward"], ["left", "right", "behind"]])
def test_what_cannot_be_set_apart_is_named(tiny_base: Path, pair: list[str]) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.apart has {pair}")):
        Text(str(tiny_base), apart=[pair])
