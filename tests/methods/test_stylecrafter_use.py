"""StyleCrafter in use: several references, switches, SDXL, released weights and export."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.diffusion.temporal import motion_modules
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter import Sampling, StyleCrafter
from lit_gen.methods.stylecrafter_sampling import guided
from lit_gen.methods.stylecrafter_weights import write_adapter, write_temporal

SIZE = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)
FAST = Sampling(steps=2, eta=0.0, text_scale=3.0, style_scale=2.0)
PROMPTS = ["a red ball", "a blue cube", "a cone"]


def method(base, stage="adapter", **changes):
    torch.manual_seed(0)
    given = dict(adapter=SIZE, image_sampling=FAST, video_sampling=FAST)
    return StyleCrafter(str(base), stage, **{**given, **changes}).eval()


@pytest.fixture(scope="module")
def model(tiny_base):
    return method(tiny_base)


def pictures(*shape, seed=0):
    return torch.rand(*shape, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- conditions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_references_are_a_set_and_padding_changes_nothing(model):
    text, views = model.text(PROMPTS), pictures(3, 4)
    whole = model.style(views, text)
    shuffled = model.style(views[:, [2, 0, 3, 1]], text)
    torch.testing.assert_close(shuffled.tokens, whole.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled.scale, whole.scale, atol=1e-5, rtol=1e-5)

    ragged = model.style([views[0, :1], views[1], views[2, :3]], text)
    assert ragged.mask is None
    for i, own in enumerate((views[:1, :1], views[1:2], views[2:, :3])):
        alone = model.style(own, model.text(PROMPTS[i : i + 1]))
        torch.testing.assert_close(ragged.tokens[i], alone.tokens[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ragged.scale[i], alone.scale[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ragged.tokens[0], whole.tokens[0], atol=1e-3)  # three references more do matter


@torch.no_grad()
def test_samples_without_reference_or_masked_are_the_plain_base(model, tiny_base):
    x, t, text = torch.randn(3, 8, 16, 16), torch.tensor([10, 500, 900]), model.text(PROMPTS)
    untouched = load_base(str(tiny_base), parts=("unet",)).unet
    plain = untouched.to(memory_format=torch.channels_last)(x, t, **text.arguments).sample
    none = [pictures(2), pictures(0), pictures(1)]
    for style in (model.style(none, text), model.style(pictures(3, 2), text, torch.tensor([1, 0, 1]))):
        out = model.network(x, t, text, style)
        assert torch.equal(out[1], plain[1])
        assert not torch.allclose(out[0], plain[0], atol=1e-3) and not torch.allclose(out[2], plain[2], atol=1e-3)
    # through the whole sampler as well, whose guidance then is that of the base
    model.image_sampling = Sampling(steps=2, eta=0.0, text_scale=2.5, style_scale=2.5)
    try:
        masked = model.sample(PROMPTS, pictures(3), [1, 2, 3], mask=torch.tensor([1, 0, 1]))
        torch.testing.assert_close(masked[1:2], model.sample(PROMPTS[1:2], None, [2]), atol=1e-4, rtol=1e-3)
    finally:
        model.image_sampling = FAST


@torch.no_grad()
def test_without_any_reference_all_are_the_plain_base_and_sizes_may_differ(model):
    x, t, text = torch.randn(2, 8, 16, 16), torch.tensor([10, 500]), model.text(PROMPTS[:2])
    plain = model.network(x, t, text, None)
    for none in (pictures(2, 0), [pictures(0), pictures(0)[..., :9]]):
        assert torch.equal(model.network(x, t, text, model.style(none, text)), plain)
    large = torch.rand(2, 3, 90, 120) * 2 - 1
    mixed = model.style([pictures(1), large], text)
    alone = model.style(large[None], model.text(PROMPTS[1:2]))
    torch.testing.assert_close(mixed.tokens[1], alone.tokens[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(7.5, 5.0), (6.0, 6.0)], ids=["two scales", "joint"])
def test_guidance_of_the_paper_and_of_the_released_code(model, scales):
    x, t = torch.randn(2, 8, 16, 16), torch.tensor([40, 700])
    text, null = model.text(PROMPTS[:2]), model.text([""]).expand(2)
    style, (lt, ls) = model.style(pictures(2), text), scales
    e0, et = model.network(x, t, null, None), model.network(x, t, text, None)
    both = model.network(x, t, text, style)
    expected = {
        "paper": e0 + ls * (both - et) + lt * (et - e0),
        "released": both + ls * (both - et) + lt * (et - e0),  # DDIMStyleSampler
    }
    for guidance, wanted in expected.items():
        calls = []

        def network(*args, calls=calls):
            calls.append(len(args[0]))
            return model.network(*args)

        how = Sampling(text_scale=lt, style_scale=ls, guidance=guidance)
        torch.testing.assert_close(guided(network, null, text, style, how)(x, t), wanted, atol=2e-4, rtol=1e-4)
        assert calls == [4 if lt == ls else 6]  # equal scales do without e(c_t)


@torch.no_grad()
def test_a_negative_prompt_takes_the_place_of_the_empty_one(model, tiny_base):
    told = method(tiny_base, negative="a green cone")
    ours, plain = (m.sample(PROMPTS[:1], None, [4]) for m in (told, model))
    assert not torch.allclose(ours, plain, atol=1e-3)
    x, t, text = torch.randn(1, 8, 16, 16), torch.tensor([500]), model.text(PROMPTS[:1])
    null = told.text([told.negative])
    e0, et = model.network(x, t, null, None), model.network(x, t, text, None)
    torch.testing.assert_close(guided(told.network, null, text, None, FAST)(x, t), e0 + 3.0 * (et - e0))


def test_other_sizes_are_drawn_and_odd_ones_refused(tiny_base):
    wide = method(tiny_base, "temporal", video_sampling=Sampling(steps=1, eta=0.0, size=(40, 64)))
    assert wide.sample(PROMPTS[:1], pictures(1), [0], frames=2).shape == (1, 2, 3, 40, 64)
    with pytest.raises(UserError, match=r"\[41, 64\].*multiples of 4"):
        method(tiny_base, image_sampling=Sampling(size=(41, 64)))


def test_clips_longer_than_the_motion_adapter_knows_are_one_line(tiny_base):
    with pytest.raises(UserError, match="model.frames is 40, but the motion adapter has positions for 32 frames"):
        method(tiny_base, "temporal", frames=40)
    with pytest.raises(UserError, match="`frames` must be at least 1, not 0"):
        method(tiny_base, "temporal", frames=0)
    batch = {"posterior": torch.zeros(1, 40, 2, 8, 2, 2), "text_states": torch.zeros(1, 9, 32), "caption": ["a ball"]}
    with pytest.raises(UserError, match="clips have 40, but"):
        method(tiny_base, "temporal").loss(batch | {"video": torch.zeros(1, 40, 3, 8, 8)})


def test_blocks_of_videocrafter_are_not_compiled_alone(sd2_base, tmp_path):
    layers = TemporalLayers.for_unet(load_base(str(sd2_base), parts=("unet",)).unet)
    layers.save_pretrained(tmp_path)
    model = method(sd2_base, "temporal", motion=str(tmp_path), compile=Compile(blocks=True))
    with pytest.raises(UserError, match="compile.blocks: VideoUNet"):
        model.configure_model()


# -- bases and weights ------------------------------------------------------------------------------------------------


def sd2_unet():
    """A tiny network of Stable Diffusion 2.x's kind, with random weights."""
    return UNet2DConditionModel(
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
    )


@pytest.fixture(scope="module")
def sd2_base(tiny_base, tmp_path_factory):
    """The tiny base with a UNet of Stable Diffusion 2.x's kind, and no temporal layers."""
    folder = tmp_path_factory.mktemp("sd2") / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("unet", "motion_adapter"))
    torch.manual_seed(0)
    sd2_unet().save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def sdxl(tiny_base, tmp_path_factory):
    """A tiny base of the SDXL kind with the tiny base's image encoder."""
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    shutil.copytree(tiny_base / "scheduler", folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    torch.manual_seed(0)
    for name, cls, width in (
        ("text_encoder", CLIPTextModel, 16),
        ("text_encoder_2", CLIPTextModelWithProjection, 32),
    ):
        tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
        )
        cls(config).save_pretrained(folder / name)
    UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    return dict(base=str(folder), image_encoder=str(tiny_base / "image_encoder"))


def test_sdxl_trains_and_draws_in_stage_adapter_alone(sdxl, tmp_path):
    size = Adapter(4, 1, 1, heads=4, predictor_heads=2, predictor_width=16, image_layer=-2)
    model = method(**sdxl, adapter=size)
    batch = {"image": pictures(2)[..., :32, :32], "style": pictures(2, seed=1), "caption": PROMPTS[:2]}
    encoded = model.encode_for_cache(batch)
    assert encoded.keys() == {"text_states", "posterior", "text_embeds"}
    seen = []
    model.base.unet.register_forward_pre_hook(lambda _, a, k: seen.append(k["added_cond_kwargs"]), with_kwargs=True)
    losses = []
    for given in (batch, {"style": batch["style"], "caption": PROMPTS[:2], **encoded}):
        torch.manual_seed(1)
        losses.append(model.loss(given))
    assert torch.equal(*losses)
    pooled = model.text(PROMPTS[:2]).added["text_embeds"]
    assert all(torch.equal(given["text_embeds"], pooled) for given in seen) and len(seen) == 2
    assert seen[0]["time_ids"][0].tolist() == [32, 32, 0, 0, 32, 32]  # of the pictures that it trains on
    losses[0].mean().backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    drawn = model.sample(PROMPTS[:2], pictures(2), [1, 2])
    assert drawn.shape == (2, 3, 32, 32) and not torch.equal(drawn, model.sample(PROMPTS[:2], None, [1, 2]))
    model.image_sampling = Sampling(steps=1, eta=0.0, size=(16, 48))
    assert model.sample(PROMPTS[:1], pictures(1), [1]).shape == (1, 3, 16, 48)
    assert seen[-1]["time_ids"][0].tolist() == [16, 48, 0, 0, 16, 48]
    with pytest.raises(UserError, match='SDXL kind.*only be in stage "adapter"') as caught:
        method(**sdxl, stage="temporal")
    assert "\n" not in str(caught.value)

    write_adapter(tmp_path / "stylecrafter_sdxl.ckpt", model.adapter, model.base.unet)
    other = method(**sdxl, adapter=size, adapter_weights=str(tmp_path / "stylecrafter_sdxl.ckpt"))
    other.image_sampling = model.image_sampling
    assert torch.equal(*(m.sample(PROMPTS[:1], pictures(1), [1]) for m in (model, other)))


def perturbed(model):
    """Every trained weight somewhere else."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in [*model.adapter.parameters(), *model.trainable_parameters()]:
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def test_an_exported_adapter_gives_the_same_picture(tiny_base, tmp_path, caplog):
    model = perturbed(method(tiny_base, export_released=True))
    model.export(tmp_path)
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert config["base"] == str(tiny_base) and config["size"]["tokens"] == 3
    assert load_file(tmp_path / "adapter" / "model.safetensors").keys() == model.adapter.state_dict().keys()
    drawn = model.sample(PROMPTS, pictures(3), [1, 2, 3])
    for weights in (tmp_path, tmp_path / "adapter", tmp_path / "adapter.pth"):
        size = SIZE if weights.suffix else Adapter()  # a folder tells it
        other = method(tiny_base, adapter=size, adapter_weights=str(weights))
        assert torch.equal(other.sample(PROMPTS, pictures(3), [1, 2, 3]), drawn), weights
    assert not caplog.text
    # a later stage's checkpoint has these weights too, though it does not train them
    later = method(tiny_base, "temporal", adapter_weights=str(tmp_path))
    assert {n for n in later.state_dict() if n.startswith("adapter.")}


def test_exported_motion_modules_give_the_same_clip(tiny_base, tmp_path):
    model = perturbed(method(tiny_base, "temporal"))
    model.export(tmp_path)
    again = method(
        tiny_base, "temporal", adapter_weights=str(tmp_path), motion=str(tmp_path / "motion_adapter"), adapter=Adapter()
    )
    drawn, redrawn = (m.sample(PROMPTS[:1], pictures(1), [1], frames=3) for m in (model, again))
    assert torch.equal(drawn, redrawn)
    fresh = method(tiny_base, "temporal").sample(PROMPTS[:1], pictures(1), [1], frames=3)
    assert not torch.allclose(drawn, fresh, atol=1e-3)


def test_released_temporal_layers_go_over_a_base_without_any(sd2_base, tmp_path):
    plain = load_base(str(sd2_base), parts=("unet",)).unet
    torch.manual_seed(5)
    layers = TemporalLayers.for_unet(plain)
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(0.1 * torch.randn(p.shape))
    write_temporal(tmp_path / "temporal_v1.pth", layers)
    model = method(sd2_base, "temporal", temporal_weights=str(tmp_path / "temporal_v1.pth"), export_released=True)
    held = [m for m in motion_modules(model.motion_unet)]
    assert all(torch.equal(a, b) for a, b in zip(held[0].parameters(), layers.parameters(), strict=True))
    assert all(p.requires_grad for p in held[0].parameters())
    drawn = model.sample(PROMPTS[:1], pictures(1), [1], frames=2)
    model.export(tmp_path / "out")
    for given in (
        dict(temporal_weights=str(tmp_path / "out" / "temporal.pth")),
        dict(motion=str(tmp_path / "out" / "motion_adapter")),
    ):
        again = method(sd2_base, "temporal", adapter_weights=str(tmp_path / "out"), **given)
        assert torch.equal(again.sample(PROMPTS[:1], pictures(1), [1], frames=2), drawn)


def test_weights_of_another_base_are_one_line(tiny_base, sd2_base, tmp_path, caplog):
    model = method(tiny_base, export_released=True)
    model.export(tmp_path)
    for weights, expected in [
        (tmp_path, "was trained for base .* does not fit .*cross attention channels"),
        (tmp_path / "adapter.pth", "does not fit this base"),
        (tmp_path / "gone.pth", "gone.pth"),
        (tiny_base, "no style adapter here"),
    ]:
        with pytest.raises(UserError, match=expected) as caught:
            method(sd2_base, adapter_weights=str(weights))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="model.motion .here. and .*--model.motion null"):
        method(sd2_base, "temporal", motion="here", temporal_weights="temporal_v1.pth")
    with pytest.raises(UserError, match="of no use in stage"):
        method(tiny_base, temporal_weights="temporal_v1.pth")
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_base / "image_encoder", encoder)
    weights = load_file(encoder / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="trained to read another image encoder") as caught:
        method(tiny_base, adapter_weights=str(tmp_path), image_encoder=str(encoder))
    assert "\n" not in str(caught.value)
    # another base of the same shape is only told of
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | {"base_fingerprint": "0" * 16}))
    method(tiny_base, adapter_weights=str(tmp_path))
    assert "other weights" in caplog.text
