"""VideoCrafter1's temporal layers against the card's formulas, and its base checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from lit_gen.diffusion.attention import Style, StyleLayer, attach_style, cross_attentions
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.original_layout import UNET, temporal_name, unet_keys, videocrafter_keys
from lit_gen.diffusion.temporal import motion_modules, motion_unet
from lit_gen.diffusion.videocrafter import INIT, TemporalLayers, VideoUNet
from lit_gen.errors import UserError

# Stable Diffusion 2.x: what diffusers calls attention_head_dim are numbers of heads, of 64 channels each
SD2 = dict(
    sample_size=64,
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
)


@pytest.fixture
def unet(sd2_folder):
    return load_base(str(sd2_folder), parts=("unet",)).unet


@pytest.fixture
def layers(unet):
    """Temporal layers that do something."""
    made = TemporalLayers.for_unet(unet, reach=3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def clips(unet, frames=6):
    x = torch.randn(2, 8, frames, 16, 16)
    return x, torch.tensor([5, 900]), torch.randn(2 * frames, 7, unet.config.cross_attention_dim)


def plain_attention(x, state, heads, reach):
    """x F C of one position: for each head and frame t, softmax_s(q_t (k_s + a_{s-t}) / sqrt(d)) (v_s + b_{s-t})."""
    q, k, v = (x @ state[f"to_{n}.weight"].T for n in "qkv")
    table_k, table_v = (state[f"relative_position_{n}.embeddings_table"] for n in "kv")
    d, out = q.shape[1] // heads, torch.zeros_like(q)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        for t in range(len(x)):
            row = [min(max(s - t, -reach), reach) + reach for s in range(len(x))]
            logits = torch.stack([q[t, own] @ (k[s, own] + table_k[row[s]]) for s in range(len(x))]) / d**0.5
            out[t, own] = sum(w * (v[s, own] + table_v[row[s]]) for s, w in enumerate(logits.softmax(0)))
    return out @ state["to_out.0.weight"].T + state["to_out.0.bias"]


def plain_transformer(x, state, heads, reach, groups):
    """x B F C h w through one temporal layer (card 7.2), position by position."""

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def linear(y, name):
        weight = state[f"{name}.weight"]
        return y @ (weight[..., 0] if weight.ndim == 3 else weight).T + state[f"{name}.bias"]

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    block, out = "transformer_blocks.0.", x.clone()
    normed = F.group_norm(x.transpose(1, 2), groups, state["norm.weight"], state["norm.bias"], eps=1e-6)  # B C F h w
    for b in range(len(x)):
        for i in range(x.shape[-2]):
            for j in range(x.shape[-1]):
                y = linear(normed[b, :, :, i, j].T, "proj_in")
                for k in (1, 2):
                    y = y + plain_attention(norm(y, f"{block}norm{k}"), part(f"{block}attn{k}."), heads, reach)
                value, gate = linear(norm(y, f"{block}norm3"), f"{block}ff.net.0.proj").chunk(2, -1)
                y = y + linear(value * F.gelu(gate), f"{block}ff.net.2")
                out[b, :, :, i, j] += linear(y, "proj_out")
    return out


@torch.no_grad()
@pytest.mark.parametrize("place", [INIT, "down_blocks.1.attentions.0"])
def test_a_layer_is_the_formula_of_the_released_model(layers, place):
    channels, heads, _ = layers.config.places[place]
    x = torch.randn(2, 5, channels, 2, 3)  # 5 frames, more than the tables reach
    expected = plain_transformer(x, layers[place].state_dict(), heads, layers.config.reach, layers.config.groups)
    actual = layers[place](x.flatten(0, 1), frames=5).unflatten(0, (2, 5))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(actual, x, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 18], ids=["even", "odd halves"])
def test_layers_stand_behind_conv_in_and_every_spatial_transformer(unet, layers, size):
    x, t, text = clips(unet)
    x = x[..., :1].expand(-1, -1, -1, 16, size).contiguous() + torch.randn(16, size)
    actual = VideoUNet(unet, layers)(x, t, text).sample
    # diffusers' own forward pass over frames, with what the layers do hooked in behind the modules
    hooks = [unet.conv_in.register_forward_hook(lambda m, a, out: layers[INIT](out, 6))]
    for place in layers.config.places:
        if place != INIT:
            hook = unet.get_submodule(place).register_forward_hook
            hooks.append(hook(lambda m, a, out, place=place: (layers[place](out[0], 6),)))
    expected = unet(x.transpose(1, 2).flatten(0, 1), t.repeat_interleave(6), text).sample
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(actual, expected.unflatten(0, (2, 6)).transpose(1, 2), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fresh_layers_are_the_identity_and_the_image_path_skips_them(unet, layers):
    x, t, text = clips(unet)
    frames = unet(x.transpose(1, 2).flatten(0, 1), t.repeat_interleave(6), text).sample
    frames = frames.unflatten(0, (2, 6)).transpose(1, 2)
    fresh = motion_unet(unet, TemporalLayers.for_unet(unet))(x, t, text).sample
    torch.testing.assert_close(fresh, frames, atol=1e-6, rtol=1e-5)
    trained = motion_unet(unet, layers)
    assert not torch.allclose(trained(x, t, text).sample, frames, atol=1e-2)
    again = unet(x.transpose(1, 2).flatten(0, 1), t.repeat_interleave(6), text).sample
    assert torch.equal(again.unflatten(0, (2, 6)).transpose(1, 2), frames)


@torch.no_grad()
def test_styles_reach_only_the_spatial_layers(unet, layers):
    style_layers = nn.ModuleList(StyleLayer(attention) for attention in cross_attentions(unet).values())
    video = motion_unet(unet, layers)
    attach_style(unet, style_layers)
    x, t, text = clips(unet)
    given = Style(torch.randn(2, 4, 32), torch.ones(2, len(style_layers)), torch.tensor([0.0, 1.0])).repeat_frames(6)
    plain, styled = video(x, t, text).sample, video(x, t, text, cross_attention_kwargs={"style": given}).sample
    assert torch.equal(plain[0], styled[0]) and not torch.allclose(plain[1], styled[1], atol=1e-3)
    assert len(style_layers) == len(layers.config.places) - 1


def test_temporal_layers_alone_train_and_checkpointing_changes_no_gradient(unet, layers):
    video = motion_unet(unet, layers)
    for modules in motion_modules(video):
        modules.requires_grad_(True)
    assert {p for p in video.parameters() if p.requires_grad} == set(layers.parameters())
    x, t, text = clips(unet)
    gradients = []
    for _ in range(2):
        loss = video(x, t, text).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, list(layers.parameters())))
        video.enable_gradient_checkpointing()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_a_single_frame_leaves_no_weight_without_a_gradient(unet, layers):
    video = motion_unet(unet, layers)
    layers.requires_grad_(True)
    video(*clips(unet, frames=1)).sample.square().mean().backward()
    assert all(p.grad is not None for p in layers.parameters())  # or DDP hangs in batches of pictures


def test_real_size_is_the_released_model():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD2)
        layers = TemporalLayers.for_unet(unet)
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert sum(p.numel() for p in layers.parameters()) == 278_575_232
    assert len(layers.config.places) == 17 and len(layers.state_dict()) == 17 * 30
    by_place = {temporal_name(p, 2): sizes[0] for p, sizes in layers.config.places.items()}
    widths = {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}
    expected = {"init_attn.0": 320, "middle_block.2": 1280} | {f"input_blocks.{i}.2": w for i, w in widths.items()}
    expected |= {f"output_blocks.{i}.2": (1280, 640, 320)[i // 3 - 1] for i in range(3, 12)}
    assert by_place == expected
    init, one = layers[INIT].state_dict(), layers["down_blocks.1.attentions.0"].state_dict()
    assert tuple(init["proj_in.weight"].shape) == (512, 320, 1) and tuple(init["proj_out.weight"].shape) == (
        320,
        512,
        1,
    )
    assert tuple(one["proj_in.weight"].shape) == (640, 640)
    for k in ("k", "v"):
        assert tuple(one[f"transformer_blocks.0.attn2.relative_position_{k}.embeddings_table"].shape) == (33, 64)
    keys = unet_keys(unet, layers)
    assert len(keys) == len(unet.state_dict()) + 17 * 30
    for name in ("middle_block.3.in_layers.0.weight", "output_blocks.2.1.conv.weight", "output_blocks.5.3.conv.weight"):
        assert UNET + name in keys
    # of Stable Diffusion itself the upsampling layer comes earlier
    assert f"{UNET}output_blocks.5.2.conv.weight" in unet_keys(unet)


def test_folder_with_temporal_layers_comes_back(sd2_folder, unet, layers, tmp_path):
    layers.save_pretrained(tmp_path / "motion")
    base = load_base(str(sd2_folder), motion=str(tmp_path / "motion"), parts=("unet",))
    assert isinstance(base.motion_adapter, TemporalLayers) and base.motion_adapter.config.reach == 3
    loaded = base.motion_adapter.state_dict()
    assert list(loaded) == list(layers.state_dict())  # or an optimizer's state would go to other weights
    assert all(torch.equal(v, loaded[k]) for k, v in layers.state_dict().items())
    assert isinstance(motion_unet(base.unet, base.motion_adapter), VideoUNet)


def test_layers_of_another_base_are_refused_in_one_line(layers, tiny_base):
    other = load_base(str(tiny_base), parts=("unet",)).unet
    with pytest.raises(UserError, match="do not fit this base's UNet: ") as caught:
        motion_unet(other, layers)
    assert "\n" not in str(caught.value)


@pytest.fixture
def checkpoint(sd2_folder):
    """Weights of a tiny VideoCrafter1 base, with what the released file holds besides."""
    base = load_base(str(sd2_folder))
    layers = TemporalLayers.for_unet(base.unet)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    keys = videocrafter_keys(base.unet, layers, base.vae, base.text_encoder)
    last = base.text_encoder.config.num_hidden_layers
    spare = {f"cond_stage_model.model.transformer.resblocks.{last}.ln_1.weight": torch.ones(32)}
    spare |= {"betas": torch.ones(1000), "cond_stage_model.model.logit_scale": torch.ones(())}
    return base, layers, keys, spare


@pytest.mark.parametrize("wrapped", [True, False])
def test_videocrafter_checkpoint_is_a_base_with_temporal_layers(checkpoint, sd2_folder, tmp_path, wrapped):
    base, layers, keys, spare = checkpoint
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": keys | spare} if wrapped else keys | spare, path)
    parts = ("tokenizer", "text_encoder", "vae", "unet", "scheduler", "motion_adapter")
    single = load_base(str(path), parts=parts, config=str(sd2_folder))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(base, part).state_dict(), getattr(single, part).state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), part
    assert all(torch.equal(v, single.motion_adapter.state_dict()[k]) for k, v in layers.state_dict().items())
    assert single.scheduler.config.prediction_type == "epsilon" and not any(
        p.requires_grad for p in single.parameters()
    )
    back = videocrafter_keys(single.unet, single.motion_adapter, single.vae, single.text_encoder)
    assert back.keys() == keys.keys() and all(torch.equal(back[k], keys[k]) for k in keys)


def test_wrong_videocrafter_checkpoints_are_one_line_that_lists_what_is_wrong(checkpoint, sd2_folder, tmp_path):
    keys, path = dict(checkpoint[2]), tmp_path / "model.ckpt"
    gone = [k for k in keys if ".middle_block.2." in k]
    for name in gone:
        del keys[name]
    keys[f"{UNET}fps_embedding.0.weight"] = torch.zeros(3)
    keys[f"{UNET}out.2.bias"] = torch.zeros(9)
    torch.save(keys, path)
    with pytest.raises(UserError) as caught:
        load_base(str(path), config=str(sd2_folder))
    message = str(caught.value)
    assert f"{len(gone)} missing ({gone[0]}, " in message and f"1 unknown ({UNET}fps_embedding.0.weight)" in message
    assert f"1 of another shape ({UNET}out.2.bias (9,) for (8,))" in message and "\n" not in message


def test_without_a_config_the_checkpoint_asks_for_stable_diffusion_2(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save(checkpoint[2], tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="hf download stabilityai/stable-diffusion-2-1-base") as caught:
        load_base(str(tmp_path / "model.ckpt"))
    assert "\n" not in str(caught.value)
