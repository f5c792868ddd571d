import pytest
import torch
import torch.nn.functional as F
from diffusers import MotionAdapter
from torch import nn

from lit_gen.diffusion.attention import Style, StyleLayer, attach_style, cross_attentions
from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.temporal import motion_modules, motion_unet
from lit_gen.errors import UserError


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base), parts=("unet", "motion_adapter"))


@pytest.fixture(scope="module")
def inputs(base):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 16, 16, generator=generator)
    text = torch.randn(3, 7, base.unet.config.cross_attention_dim, generator=generator)
    return x, torch.tensor([5, 500, 990]), text


@pytest.fixture(scope="module")
def untouched(base, inputs):
    """Output of the base before any of our processors is in it."""
    with torch.no_grad():
        return base.unet(*inputs).sample


@pytest.fixture(scope="module")
def layers(base, untouched):
    made = nn.ModuleList(StyleLayer(attention) for attention in cross_attentions(base.unet).values())
    attach_style(base.unet, made)
    return made


def style(base, layers, batch, mask=None):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, 4, base.unet.config.cross_attention_dim, generator=generator)
    return Style(tokens, 2 * torch.rand(batch, len(layers), generator=generator), mask)


def test_layers_are_numbered_as_the_unet_executes_them(base, layers):
    executed = []
    names = cross_attentions(base.unet)
    hooks = [m.register_forward_hook(lambda *_, n=n: executed.append(n)) for n, m in names.items()]
    with torch.no_grad():
        base.unet(torch.zeros(1, 8, 16, 16), 1, torch.zeros(1, 7, base.unet.config.cross_attention_dim))
    for hook in hooks:
        hook.remove()
    assert executed == list(names)
    enumerated = [n.removesuffix(".processor") for n in base.unet.attn_processors if "attn2" in n]
    assert enumerated != executed  # diffusers' own order would be wrong


def test_null_style_is_the_untouched_base_bit_for_bit(base, inputs, untouched, layers):
    for layer in layers:
        nn.init.normal_(layer.norm_style.bias)  # what a mask before the norm would let through
    with torch.no_grad():
        without = base.unet(*inputs).sample
        mixed = style(base, layers, 3, torch.tensor([0.0, 1.0, 0.0]))
        masked = base.unet(*inputs, cross_attention_kwargs={"style": mixed}).sample
    assert torch.equal(without, untouched)
    assert torch.equal(masked[[0, 2]], untouched[[0, 2]])
    assert not torch.allclose(masked[1], untouched[1], atol=1e-3)


def test_one_layer_is_the_formula_of_the_paper(base, layers):
    index, (name, attention) = next((i, x) for i, x in enumerate(cross_attentions(base.unet).items()) if "mid" in x[0])
    layer, heads = layers[index], attention.heads
    width = attention.to_q.in_features
    hidden, text = torch.randn(2, 9, width), torch.randn(2, 7, base.unet.config.cross_attention_dim)
    given = style(base, layers, 2)

    def attend(q, k, v):  # softmax(q k^T / sqrt(d)) v head by head, written out
        d = q.shape[-1] // heads
        parts = []
        for h in range(heads):
            s = slice(h * d, (h + 1) * d)
            weights = (q[..., s] @ k[..., s].transpose(1, 2) / d**0.5).softmax(-1)
            parts.append(weights @ v[..., s])
        return torch.cat(parts, -1)

    q = attention.to_q(hidden)
    o_text = attend(q, attention.to_k(text), attention.to_v(text))
    o_style = attend(q, layer.to_k_style(given.tokens), layer.to_v_style(given.tokens))
    o_style = F.layer_norm(o_style, (width,), layer.norm_style.weight, layer.norm_style.bias)
    expected = attention.to_out[0](o_text + given.scale[:, index, None, None] * o_style)
    actual = attention(hidden, encoder_hidden_states=text, style=given)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_style_layers_start_as_the_text_layers_and_have_one_owner(base, layers):
    for attention, layer in zip(cross_attentions(base.unet).values(), layers, strict=True):
        assert torch.equal(layer.to_k_style.weight, attention.to_k.weight)
        assert torch.equal(layer.to_v_style.weight, attention.to_v.weight)
        assert layer.to_v_style.weight is not attention.to_v.weight
    assert not any("style" in name for name in base.unet.state_dict())


def test_standard_processors_would_have_dropped_the_style(base, layers, inputs, caplog):
    base.unet(*inputs, cross_attention_kwargs={"style": style(base, layers, 3)})
    assert "will be ignored" not in caplog.text


def test_motion_unet_shares_the_image_unet_and_its_style(base, inputs, layers):
    motion = motion_unet(base.unet, base.motion_adapter)
    spatial = {id(p) for p in base.unet.parameters()}
    temporal = {id(p) for modules in motion_modules(motion) for p in modules.parameters()}
    assert {id(p) for p in motion.parameters()} == spatial | temporal
    assert not spatial & temporal

    x, t, text = inputs
    clip = x[:, :, None].repeat(1, 1, 4, 1, 1)  # B C F h w
    given = style(base, layers, 3, torch.tensor([0.0, 1.0, 1.0])).repeat_frames(4)
    text = text.repeat_interleave(4, 0)
    with torch.no_grad():
        plain = motion(clip, t, text).sample
        styled = motion(clip, t, text, cross_attention_kwargs={"style": given}).sample
    assert torch.equal(plain[0], styled[0])
    assert not torch.allclose(plain[1], styled[1], atol=1e-3)


@pytest.mark.parametrize("widths", [(16, 32, 64), (32, 64)], ids=["more blocks", "wider"])
def test_motion_adapter_of_another_base_is_refused_in_one_line(base, widths):
    other = MotionAdapter(widths, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=16)
    with pytest.raises(UserError, match="motion adapter does not fit") as caught:
        motion_unet(base.unet, other)
    assert "\n" not in str(caught.value)
