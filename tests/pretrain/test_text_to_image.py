"""Text-to-image training with the text encoder tuned along."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as L
import torch
from safetensors.torch import load_file

from lit_gen.data.world import RenderedWorld
from lit_gen.metrics.clip import CLIPEncoders
from lit_gen.pretrain.text_to_image import TextToImage


def fit(base: Path, text_lr: float | None, weight: float = 0.05, steps: int = 4) -> TextToImage:
    L.seed_everything(0)
    model = TextToImage(str(base), [16, 32], text_lr=text_lr, contrast_weight=weight, sample_steps=0, export=str(base))
    data = RenderedWorld(
        pool=32, batch_size=16, val_pool=16, captions=1, tokenizer=str(base / "tokenizer"), workers=0,
        autoencoder=str(base / "vae"), clip=str(base),
    )  # fmt: skip
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, **quiet).fit(model, datamodule=data)
    return model


def weights(base: Path) -> dict[str, torch.Tensor]:
    return load_file(base / "text_encoder" / "model.safetensors")


def test_a_frozen_text_encoder_stays_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    before = weights(base)
    fit(base, None)
    assert all(torch.equal(before[n], w) for n, w in weights(base).items())


def test_a_tuned_text_encoder_learns_from_both_losses_and_loads_as_before(tiny_base: Path, tmp_path: Path) -> None:
    noise, both = (Path(shutil.copytree(tiny_base, tmp_path / name)) for name in ("noise", "both"))
    before = weights(noise)
    fit(noise, 1e-3, weight=0.0)
    model = fit(both, 1e-3, weight=1.0)
    one, other = weights(noise), weights(both)
    assert one.keys() == other.keys() == before.keys()
    learned = "embeddings.token_embedding.weight"
    name = next(n for n in before if n.endswith(learned))
    assert not torch.equal(before[name], one[name]) and not torch.equal(one[name], other[name])
    rates = [group["lr"] / group["initial_lr"] for group in model.optimizers().param_groups]
    assert rates[0] == rates[1] and [g["initial_lr"] for g in model.optimizers().param_groups] == [1e-3, 1e-3]
    text = "a red cube left of a blue ball"
    tokens = CLIPEncoders(both).tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(CLIPEncoders(both).embed_text([text]), model.text.embed(tokens), atol=5e-3, rtol=0)
