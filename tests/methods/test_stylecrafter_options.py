"""StyleCrafter's options: ablations, the released code's deviations, dropped conditions; and what is frozen."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_gen.diffusion.attention import Style, cross_attentions
from lit_gen.diffusion.image_prompt import encode_image
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter import StyleCrafter
from lit_gen.methods.stylecrafter_judgement import Judgement, random_view

SIZE = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)
PROMPTS = ["a red ball", "a blue cube", "a cone"]


def method(base, stage="adapter", **changes):
    torch.manual_seed(0)
    return StyleCrafter(str(base), stage, **{"adapter": SIZE, **changes}).eval()


def pictures(*shape, seed=0):
    return torch.rand(*shape, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cached(stage="adapter"):
    """A batch as a cached set gives it."""
    generator = torch.Generator().manual_seed(2)
    text = {"text_states": torch.randn(2, 40, 32, generator=generator), "caption": PROMPTS[:2]}
    if stage == "temporal":
        return text | {"posterior": torch.rand(2, 3, 2, 8, 16, 16, generator=generator), "video": pictures(2, 3)}
    return text | {"posterior": torch.rand(2, 2, 8, 16, 16, generator=generator), "style": pictures(2)}


def test_the_oracle_judges_only_pictures_of_the_world():
    judgement = Judgement("adapter", str(Path(__file__).parents[2] / "data/oracle"))
    with pytest.raises(UserError, match="shard/b is no picture of the world.*set model.oracle to null"):
        judgement.judge_pictures(None, {"key": ["shard/b"], "facts": [{"photographer": "me"}]})


# -- the paper's ablations --------------------------------------------------------------------------------------------


def test_appended_tokens_train_the_extractor_alone_and_switch_off_exactly(tiny_base):
    model = method(tiny_base, adapter=Adapter(3, 1, 1, 2, fusion="appended"))
    assert {n.split(".")[1] for n in model.state_dict()} == {"extractor"}
    x, t, text = torch.randn(2, 8, 16, 16), torch.tensor([10, 500]), model.text(PROMPTS[:2])
    style = model.style(pictures(2), text, torch.tensor([0, 1]))
    with torch.no_grad():
        out, plain = model.network(x, t, text, style), model.network(x, t, text, None)
        # the same as a longer text
        longer = torch.cat([text.states, style.tokens], dim=1)
        appended = model.base.unet(x, t, longer).sample
    assert torch.equal(out[0], plain[0])
    torch.testing.assert_close(out[1], appended[1], atol=1e-4, rtol=1e-4)
    batch = {"image": pictures(2), "style": pictures(2, seed=1), "caption": PROMPTS[:2]}
    model.loss(batch).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable_parameters())


def test_a_fixed_scale_is_the_same_for_every_style(tiny_base):
    model = method(tiny_base, adapter=Adapter(3, 1, 1, 2, fixed_scale=0.7), style_weight=0.5)
    style = model.style(pictures(2), model.text(PROMPTS[:2]))
    assert torch.equal(style.scale, torch.full((2, len(model.adapter.layers)), 0.35))
    assert not any("predictor" in name for name in model.state_dict())


def test_without_decoupling_the_reference_is_the_target(tiny_base):
    model, batch = method(tiny_base, decoupled=False), {"image": pictures(2), "caption": PROMPTS[:2]}
    assert model.references(batch | {"style": pictures(2, seed=1)}) is batch["image"]
    assert method(tiny_base).references(batch | {"style": batch["image"][:1]}).shape[0] == 1
    with pytest.raises(UserError, match="decoupled"):
        model.references({"style": batch["image"], "caption": PROMPTS[:2]})


def test_joint_training_reaches_adapter_and_motion_modules_with_a_rate_each(tiny_base):
    model = method(tiny_base, "joint", temporal_lr=1e-5).train()
    for batch in (
        {"image": pictures(2), "style": pictures(2, seed=1), "caption": PROMPTS[:2]},
        {"video": pictures(2, 3), "caption": PROMPTS[:2]},
    ):
        model.zero_grad()
        model.loss(batch).mean().backward()
        assert all(p.grad is not None for p in model.trainable_parameters())
    adapter, temporal = model.parameter_groups()
    assert temporal["lr"] == 1e-5 and "lr" not in adapter
    ids = [id(p) for group in (adapter, temporal) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.trainable_parameters())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in names} == {"adapter", "motion_unet"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_pictures_have_the_error_of_the_clean_latent_and_clips_the_plain_one(tiny_base, monkeypatch, prediction):
    ours = method(tiny_base, "joint", timestep_bias=3.0, error_of="clean")
    plain = method(tiny_base, "joint")
    for model in (ours, plain):
        model.schedule.prediction = prediction
    seen = {}
    network, posterior = ours.network, ours.base.draw

    def watched(noisy, t, *rest):
        seen.update(noisy=noisy, t=t, output=network(noisy, t, *rest))
        return seen["output"]

    def drawn(encoded):
        seen["clean"] = posterior(encoded)
        return seen["clean"]

    monkeypatch.setattr(ours, "network", watched)
    monkeypatch.setattr(ours.base, "draw", drawn)

    def losses(batch):
        found = []
        for model in (ours, plain):
            torch.manual_seed(4)
            found.append(model.loss(batch))
        return found

    clips, pictured = {"video": pictures(2, 3), "caption": PROMPTS[:2]}, {"caption": PROMPTS[:2]}
    assert torch.equal(*losses(clips))
    biased, uniform = losses(pictured | {"image": pictures(2), "style": pictures(2, seed=1)})
    clean, _ = ours.schedule.split(seen["output"], seen["noisy"], seen["t"])
    literal = (clean - seen["clean"][:, None]).square().flatten(1).mean(1)
    abar = ours.schedule.alphas_cumprod[seen["t"]]
    bound = 1 / (1 + 0.005 * (1 - abar) / abar) if prediction == "epsilon" else 1.0
    torch.testing.assert_close(biased, literal * bound, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(biased, uniform)


# -- the released code's deviations -----------------------------------------------------------------------------------


@torch.no_grad()
def test_unscaled_style_attention_is_that_of_keys_larger_by_sqrt_d(tiny_base):
    model, plain = (method(tiny_base, adapter=Adapter(3, 1, 1, 2, style_attention=a)) for a in ("unscaled", "scaled"))
    x, t, text = torch.randn(2, 8, 16, 16), torch.tensor([10, 500]), model.text(PROMPTS[:2])
    style = model.style(pictures(2), text)
    out = model.network(x, t, text, style)
    assert not torch.allclose(out, plain.network(x, t, text, style), atol=1e-4)
    for layer, attention in zip(plain.adapter.layers, cross_attentions(plain.base.unet).values(), strict=True):
        layer.to_k_style.weight.mul_((attention.to_k.out_features / attention.heads) ** 0.5)
    torch.testing.assert_close(out, plain.network(x, t, text, style), atol=1e-4, rtol=1e-4)
    untouched = model.network(x, t, text, model.style(pictures(2), text, torch.zeros(2)))
    assert torch.equal(untouched, model.network(x, t, text, None))  # the text's attention is what it was


@pytest.mark.parametrize("origin", ["values", "keys"])
def test_style_values_start_from_the_texts_values_or_keys(tiny_base, origin):
    model = method(tiny_base, adapter=Adapter(3, 1, 1, 2, values_from=origin))
    for layer, attention in zip(model.adapter.layers, cross_attentions(model.base.unet).values(), strict=True):
        source = attention.to_k if origin == "keys" else attention.to_v
        assert torch.equal(layer.to_v_style.weight, source.weight)
        assert torch.equal(layer.to_k_style.weight, attention.to_k.weight)


# -- dropped conditions -----------------------------------------------------------------------------------------------


def test_conditions_are_dropped_in_the_shares_that_were_asked_for(tiny_base):
    model = method(tiny_base, drop_style=0.1, drop_text=0.2, drop_both=0.3)
    count, null = 4000, model.text([""]).states[0]
    text = model.text(PROMPTS[:1]).expand(count)
    given, mask = model._drop(text, Style(torch.zeros(count, 1, 1), torch.zeros(count, 2)), (64, 64))
    untold = (given.states == null).all(-1).all(-1)
    assert torch.equal(given.states[~untold], text.states[~untold])
    shares = {(bool(u), bool(m)): float(((untold == u) & (mask == m)).float().mean()) for u in (0, 1) for m in (0, 1)}
    expected = {(False, True): 0.4, (False, False): 0.1, (True, True): 0.2, (True, False): 0.3}
    assert shares == pytest.approx(expected, abs=0.03)
    with pytest.raises(UserError, match="at most 1 together"):
        method(tiny_base, drop_style=0.6, drop_both=0.6)


def test_a_dropped_prompt_is_the_empty_one_and_encoded_once(tiny_base):
    batch = cached()
    told = batch | {"text_states": method(tiny_base).text(["", ""]).states}
    dropped = method(tiny_base, drop_text=1.0, adapter=Adapter(3, 1, 1, 2, fixed_scale=1.0))
    plain = method(tiny_base, drop_style=1e-9, adapter=Adapter(3, 1, 1, 2, fixed_scale=1.0))  # as many random numbers
    calls = []
    dropped.base.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    losses = []
    for model, given in ((dropped, batch), (plain, told), (dropped, batch)):
        torch.manual_seed(3)
        losses.append(model.loss(given))
    torch.testing.assert_close(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2]) and len(calls) == 1


# -- references, and what is frozen -----------------------------------------------------------------------------------


def test_a_random_view_is_a_crop_of_the_enlarged_picture():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 64), indexing="ij")
    images = torch.stack([x, y, torch.zeros_like(x)]).expand(8, -1, -1, -1)
    torch.manual_seed(0)
    views = random_view(images, 800 / 512)
    assert views.shape == images.shape
    for channel in (0, 1):
        extent = views[:, channel].amax((1, 2)) - views[:, channel].amin((1, 2))
        torch.testing.assert_close(extent, torch.full((8,), 2 * 512 / 800), atol=0.06, rtol=0)
    corners = {tuple(view[:2, 0, 0].tolist()) for view in views}
    assert len(corners) == 8  # each from a place of its own
    assert torch.equal(random_view(images, 1.0), images)


@torch.no_grad()
def test_the_layer_before_the_last_is_the_encoders_raw_hidden_state(tiny_base):
    base = method(tiny_base).base
    encoder, images = base.image_encoder, pictures(2)
    side = encoder.config.image_size
    resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(getattr(base.image_processor, f"image_{n}")).view(3, 1, 1) for n in ("mean", "std"))
    pixels = ((resized + 1) / 2 - mean) / std
    states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
    for layer in (-2, -3)[: len(states) - 1]:
        assert torch.equal(encode_image(encoder, base.image_processor, images, layer), states[layer])
    assert not torch.allclose(encode_image(encoder, base.image_processor, images, -1), states[-2], atol=1e-3)


@pytest.mark.parametrize("stage", ["adapter", "temporal"])
def test_a_cached_step_runs_no_frozen_encoder_and_keeps_nothing_before_what_is_trained(tiny_base, stage):
    model, ran, kept = method(tiny_base, stage), [], {}
    for name in ("text_encoder", "vae"):
        for part in getattr(model.base, name).modules():
            part.register_forward_hook(lambda *_, name=name: ran.append(name))
    unet = model.base.unet
    early = {"conv_in": unet.conv_in, "first resnet": unet.down_blocks[0].resnets[0], "time": unet.time_embedding}
    early["image encoder"] = model.base.image_encoder.vision_model.encoder.layers[-1]
    for name, part in early.items():
        part.register_forward_hook(
            lambda _, __, out, name=name: kept.update({name: (out[0] if isinstance(out, tuple) else out).requires_grad})
        )
    model.loss(cached(stage)).mean().backward()
    assert not ran
    called = set(early) if stage == "adapter" else set(early) - {"time"}  # a motion UNet has the same one, or its own
    assert called <= kept.keys() and not any(kept.values())  # what needs no gradient, autograd keeps nothing of
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in model.trainable_parameters())
