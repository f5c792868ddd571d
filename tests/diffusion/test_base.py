import shutil

import pytest
import torch
from safetensors.torch import save_file

from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.original_layout import clip_keys, open_clip_keys, unet_keys, vae_keys
from lit_gen.errors import UserError

ALL = ("tokenizer", "text_encoder", "vae", "unet", "scheduler", "image_encoder", "motion_adapter")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base), parts=ALL)


def test_folder_is_frozen_in_eval_mode_and_whole(base):
    assert all(getattr(base, part) is not None for part in (*ALL, "image_processor"))
    assert not any(p.requires_grad for p in base.parameters())
    assert not any(m.training for m in base.modules())


def test_latents_are_scaled_and_come_back(base):
    latents = base.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert latents.shape == (2, 8, 16, 16) and not latents.requires_grad
    raw = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    assert torch.equal(base.decode(latents), raw.clamp(-1, 1))


@pytest.mark.parametrize("text_keys", [clip_keys, open_clip_keys], ids=["SD 1.x", "SD 2.x"])
def test_single_file_in_the_original_layout_is_the_same_model(base, tiny_base, tmp_path, text_keys):
    weights = unet_keys(base.unet) | vae_keys(base.vae) | text_keys(base.text_encoder)
    path = tmp_path / "model.safetensors"
    save_file({k: v.clone() for k, v in weights.items()}, path)
    single = load_base(str(path), parts=ALL, config=str(tiny_base))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(base, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), part
    assert type(single.scheduler).__name__ == "DDIMScheduler"
    assert single.motion_adapter is not None


def test_pickled_ckpt_is_read_without_unpickling_code(base, tiny_base, tmp_path):
    path = tmp_path / "model.ckpt"
    weights = unet_keys(base.unet) | vae_keys(base.vae) | clip_keys(base.text_encoder)
    torch.save({"state_dict": weights}, path)
    single = load_base(str(path), config=str(tiny_base))
    assert torch.equal(single.unet.conv_in.weight, base.unet.conv_in.weight)

    class Code:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"state_dict": weights, "code": Code()}, path)
    with pytest.raises(UserError, match="model.ckpt"):
        load_base(str(path), config=str(tiny_base))


def test_mistakes_are_one_line_that_helps(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = tmp_path / "world-base"
    shutil.copytree(tiny_base, copy)
    (copy / "unet").rename(copy / "unett")
    cases = [
        (lambda: load_base(str(tmp_path / "world-bse")), "did you mean"),
        (lambda: load_base(str(tmp_path / "model.safetensors")), "no such file"),
        (lambda: load_base(str(copy)), "unett"),
        (lambda: load_base("someone/never-cached-model"), "cache"),
        (lambda: load_base(str(tiny_base), motion="someone/never-cached-motion"), "cache"),
        (lambda: load_base("nonsense"), "Hub id"),
    ]
    for call, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_autoencoder_keeps_its_precision_in_mixed_training(base):
    latents = torch.randn(1, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = base.decode(latents)
    assert torch.equal(mixed, base.decode(latents))


def test_many_and_large_pictures_go_through_the_autoencoder_in_parts(base, monkeypatch):
    torch.manual_seed(0)
    images, latents = torch.rand(5, 3, 64, 64) * 2 - 1, torch.randn(5, 8, 16, 16)
    whole, drawn = base.posterior(images), base.decode(latents)
    seen = []
    for name in ("encode", "decode"):
        real = getattr(base.vae, name)
        monkeypatch.setattr(base.vae, name, lambda x, real=real: seen.append(len(x)) or real(x))
    for limit, value in (("AT_ONCE", 2), ("PIXELS_AT_ONCE", 2 * 64 * 64 + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"lit_gen.diffusion.base.{limit}", value)
            torch.testing.assert_close(base.posterior(images), whole, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(base.decode(latents), drawn, atol=1e-5, rtol=1e-4)
    assert seen == [2, 2, 1] * 4
