"""Bases of the Stable Diffusion XL kind: two text encoders, and a UNet that reads a pooled embedding and sizes."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_gen.diffusion.attention import attach_style, cross_attentions
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.original_layout import clip_keys, open_clip_keys, unet_keys, vae_keys
from lit_gen.diffusion.style_adapter import Adapter, StyleAdapter
from lit_gen.diffusion.text import TextCondition
from lit_gen.errors import UserError

PROMPTS = ["a red ball", "a blue cube on a green cone"]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline with random weights, as diffusers itself writes it."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    second = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer", pad_token="!")  # as SDXL's second pads

    def encoder(cls, width):
        return cls(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=8,
        sample_size=32,
    )
    path = tmp_path_factory.mktemp("sdxl") / "base"
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder(CLIPTextModel, 16),
        text_encoder_2=encoder(CLIPTextModelWithProjection, 32),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def test_text_condition_and_network_are_those_of_diffusers_own_pipeline(folder, pipeline, monkeypatch):
    base = load_base(str(folder))
    ours = base.text_condition(PROMPTS)
    theirs = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.states, theirs[0])
    torch.testing.assert_close(ours.added["text_embeds"], theirs[2])
    assert not ours.states.requires_grad and ours.states.shape == (2, base.tokenizer.model_max_length, 48)

    seen = []

    def forward(*args, own=pipeline.unet.forward, **kwargs):
        seen.append((args, kwargs, own(*args, **kwargs)))
        return seen[-1][2]

    monkeypatch.setattr(pipeline.unet, "forward", forward)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    (x, t), kwargs, output = seen[0]
    torch.testing.assert_close(ours.added["time_ids"], kwargs["added_cond_kwargs"]["time_ids"])
    assert ours.added["time_ids"][0].tolist() == [32, 32, 0, 0, 32, 32]
    with torch.no_grad():
        torch.testing.assert_close(base.unet(x, t, **ours.arguments).sample, output[0])


def test_sizes_that_the_network_is_told_can_be_chosen(folder):
    base = load_base(str(folder))
    assert base.text_condition(["a ball"], size=(48, 64)).added["time_ids"].tolist() == [[48, 64, 0, 0, 48, 64]]
    cached = base.text_condition(PROMPTS, size=(48, 64))
    again = base.told(cached.states, cached.added["text_embeds"], (48, 64))
    assert torch.equal(again.added["time_ids"], cached.added["time_ids"])
    with pytest.raises(UserError, match="longer than"):
        base.text_condition(["red " * 100], strict=True)


def test_conditions_are_joined_and_repeated_with_all_that_belongs_to_them(folder):
    base = load_base(str(folder))
    null, text = base.text_condition([""]), base.text_condition(PROMPTS)
    joined = TextCondition.cat([null.expand(2), text])
    separate = base.text_condition(["", "", *PROMPTS])
    assert len(joined) == 4
    torch.testing.assert_close(joined.states, separate.states)
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(joined.added[name], separate.added[name])
    repeated = text.repeat_frames(3)
    assert torch.equal(repeated.states[3:], text.states[1:].expand(3, -1, -1))
    assert torch.equal(repeated.added["text_embeds"][:3], text.added["text_embeds"][:1].expand(3, -1))


def test_other_bases_have_a_plain_condition(tiny_base):
    base = load_base(str(tiny_base))
    condition = base.text_condition(PROMPTS)
    assert condition.added is None and condition.arguments.keys() == {"encoder_hidden_states"}
    assert condition.expand(2).added is None and TextCondition.cat([condition, condition]).added is None
    ids = base.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(condition.states, base.text_encoder(ids).last_hidden_state)


def test_style_is_added_to_every_cross_attention_and_null_style_is_the_base(folder):
    base = load_base(str(folder), parts=("unet", "text_encoder", "tokenizer", "vae"))
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 800]), base.text_condition(PROMPTS)
    size = Adapter(tokens=4, extractor_layers=1, heads=4, predictor_heads=2, predictor_width=16, image_layer=-2)
    adapter = StyleAdapter(base.unet, 20, size)
    assert len(adapter.layers) == len(cross_attentions(base.unet)) == 2 * 2 + 2 + 3 * 2  # down, mid, up
    with torch.no_grad():
        untouched = base.unet(x, t, **text.arguments).sample
        attach_style(base.unet, adapter.layers)
        style = adapter(torch.randn(2, 5, 20), text.states)
        assert style.tokens.shape == (2, 4, 48) and style.scale.shape == (2, 12)
        style.mask = torch.tensor([0.0, 1.0])
        styled = base.unet(x, t, **text.arguments, cross_attention_kwargs={"style": style}).sample
    assert torch.equal(styled[0], untouched[0]) and not torch.allclose(styled[1], untouched[1], atol=1e-3)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_is_the_same_model(folder, tmp_path, suffix):
    base = load_base(str(folder))
    weights = unet_keys(base.unet) | vae_keys(base.vae)
    weights |= clip_keys(base.text_encoder, "conditioner.embedders.0.transformer.")
    weights |= open_clip_keys(base.text_encoder_2, "conditioner.embedders.1.model.")
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file({k: v.clone() for k, v in weights.items()}, path)
    else:
        torch.save({"state_dict": weights}, path)
    single = load_base(str(path), config=str(folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(base, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), part
    torch.testing.assert_close(single.text_condition(PROMPTS).states, base.text_condition(PROMPTS).states)


def test_an_sdxl_folder_without_its_second_tokenizer_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "tokenizer_2")
    with pytest.raises(UserError, match="no tokenizer_2/ folder"):
        load_base(str(tmp_path / "base"))
