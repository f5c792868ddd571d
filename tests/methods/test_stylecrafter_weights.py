"""Released weights of StyleCrafter: their names and shapes from the card, and what they compute, written out."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from lit_gen.diffusion.attention import attach_style, cross_attentions
from lit_gen.diffusion.style_adapter import SDXL, VIDEOCRAFTER, Adapter, StyleAdapter
from lit_gen.diffusion.videocrafter import TemporalLayers
from lit_gen.errors import UserError
from lit_gen.methods.stylecrafter_weights import (
    load_official_adapter,
    load_official_temporal,
    official_adapter,
    official_temporal,
    read_adapter,
    read_temporal,
    write_adapter,
    write_temporal,
)

SD2 = dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
SD_XL = dict(
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[320, 640, 1280],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
TINY = dict(sample_size=8, norm_num_groups=8, use_linear_projection=True, cross_attention_dim=12)
TINY_SD2 = TINY | dict(
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    block_out_channels=[16, 32, 32],
    attention_head_dim=[2, 4, 4],
)
TINY_SDXL = TINY | dict(
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[16, 32],
    transformer_layers_per_block=[1, 2],
    attention_head_dim=[2, 4],
)
TINY_SIZE = Adapter(tokens=3, extractor_layers=2, predictor_layers=1, heads=2)
TINY_SDXL_SIZE = Adapter(3, 2, 1, heads=4, predictor_heads=2, predictor_width=8, image_layer=-2)
IMAGE = 20  # width of the tiny image tokens


# -- names and shapes, from the card ----------------------------------------------------------------------------------


def transformer(prefix, width, layers):
    """One transformer of either file, without its queries."""
    shapes = {f"{prefix}ln{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    for i in range(layers):
        block = f"{prefix}transformer_blocks.resblocks.{i}."
        shapes |= {f"{block}ln_{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * width, width), f"{block}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}mlp.c_proj.weight": (width, 4 * width), f"{block}mlp.c_proj.bias": (width,)}
    return shapes


def style_layer(prefix, width, text):
    shapes = {f"{prefix}.{name}.weight": (width, text) for name in ("to_k_style", "to_v_style")}
    return shapes | {f"{prefix}.norm_style.{kind}": (width,) for kind in ("weight", "bias")}


def videocrafter_shapes(image, text, tokens, layers, predictor_layers, places):
    """`adapter_v1.pth` (card 7.1); places are (path, width) of the cross-attentions in execution order."""
    shapes = {"image_context_model.style_emb": (1, tokens, image), "image_context_model.proj": (image, text)}
    shapes |= transformer("image_context_model.", image, layers)
    shapes |= {"scale_predictor.scale_emb": (1, len(places), text)}
    shapes |= transformer("scale_predictor.", text, predictor_layers)
    shapes |= {"scale_predictor.out.0.weight": (32, text), "scale_predictor.out.0.bias": (32,)}
    shapes |= {"scale_predictor.out.2.weight": (1, 32), "scale_predictor.out.2.bias": (1,)}
    for place, width in places:
        name = f"kv_attn_layers.{place.replace('.', '_')}_1_transformer_blocks_0_attn2_processor"
        shapes |= style_layer(name, width, text)
    return shapes


def sdxl_shapes(image, text, tokens, layers, predictor_layers, inner, widths):
    """`stylecrafter_sdxl.ckpt` (card 7.3); widths of the cross-attentions in the order of `attn_processors`."""
    shapes = {"image_context_model.query_emb": (1, tokens, image), "image_context_model.proj": (image, text)}
    shapes |= transformer("image_context_model.", image, layers)
    for name in ("text_proj", "style_proj"):
        shapes |= {f"scale_predictor.{name}.weight": (inner, text), f"scale_predictor.{name}.bias": (inner,)}
    shapes |= {"scale_predictor.scale_predictor.query_emb": (1, len(widths), inner)}
    shapes |= {"scale_predictor.scale_predictor.proj": (inner, inner)}
    shapes |= transformer("scale_predictor.scale_predictor.", inner, predictor_layers)
    shapes |= {"scale_predictor.out_proj.0.weight": (32, inner), "scale_predictor.out_proj.0.bias": (32,)}
    shapes |= {"scale_predictor.out_proj.2.weight": (1, 32), "scale_predictor.out_proj.2.bias": (1,)}
    for j, width in enumerate(widths):
        shapes |= style_layer(f"kv_attn_layers.{2 * j + 1}", width, text)
    return shapes


def temporal_shapes(places, head_dim, rows):
    """`temporal_v1.pth` (card 7.2); places are (name, width)."""
    shapes = {}
    for place, width in places:
        inner = 8 * head_dim if place == "init_attn.0" else width
        one = (1,) if place == "init_attn.0" else ()
        layer = {"norm.weight": (width,), "norm.bias": (width,)}
        layer |= {"proj_in.weight": (inner, width, *one), "proj_in.bias": (inner,)}
        layer |= {"proj_out.weight": (width, inner, *one), "proj_out.bias": (width,)}
        block = "transformer_blocks.0."
        for attn in ("attn1", "attn2"):
            layer |= {f"{block}{attn}.to_{n}.weight": (inner, inner) for n in "qkv"}
            layer |= {f"{block}{attn}.to_out.0.weight": (inner, inner), f"{block}{attn}.to_out.0.bias": (inner,)}
            layer |= {f"{block}{attn}.relative_position_{n}.embeddings_table": (rows, head_dim) for n in "kv"}
        layer |= {f"{block}ff.net.0.proj.weight": (8 * inner, inner), f"{block}ff.net.0.proj.bias": (8 * inner,)}
        layer |= {f"{block}ff.net.2.weight": (inner, 4 * inner), f"{block}ff.net.2.bias": (inner,)}
        layer |= {f"{block}norm{k}.{kind}": (inner,) for k in (1, 2, 3) for kind in ("weight", "bias")}
        shapes[place] = layer
    return shapes


def real_places():
    inputs = [(f"input_blocks.{i}", w) for i, w in {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}.items()]
    outputs = [(f"output_blocks.{i}", (1280, 640, 320)[i // 3 - 1]) for i in range(3, 12)]
    return [*inputs, ("middle_block", 1280), *outputs]


def tiny_places():
    inputs = [(f"input_blocks.{i}", w) for i, w in {1: 16, 2: 16, 4: 32, 5: 32}.items()]
    return [*inputs, ("middle_block", 32), *((f"output_blocks.{i}", (32, 16)[i // 3 - 1]) for i in range(3, 9))]


TINY_VIDEOCRAFTER_SHAPES = videocrafter_shapes(IMAGE, 12, 3, 2, 1, tiny_places())
# two transformers of two blocks on the way down, three on the way up, one of two in the middle
TINY_SDXL_SHAPES = sdxl_shapes(IMAGE, 12, 3, 2, 1, 8, [32] * (2 * 2 + 3 * 2 + 2))


def drawn(shapes):
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def total(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(
    "config,size,expected,count,parameters",
    [
        (SD2, VIDEOCRAFTER, videocrafter_shapes(1280, 1024, 8, 3, 2, real_places()), 139, 111_188_161),
        (
            SD_XL,
            SDXL,
            sdxl_shapes(1280, 2048, 16, 4, 2, 512, [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10),
            372,
            431_029_825,
        ),
    ],
    ids=["VideoCrafter1", "SDXL"],
)
def test_real_adapters_have_the_names_and_shapes_of_the_released_files(config, size, expected, count, parameters):
    assert len(expected) == count and total(expected) == parameters  # the card's table is right itself
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        adapter = StyleAdapter(unet, 1280, size)
        assert shapes_of(official_adapter(adapter, unet)) == expected
        load_official_adapter(adapter, unet, {k: torch.empty(v) for k, v in expected.items()})
    assert sum(p.numel() for p in adapter.parameters()) == parameters


def test_real_temporal_layers_have_the_names_and_shapes_of_the_released_files():
    places = [("init_attn.0", 320), *((f"{place}.2", width) for place, width in real_places())]
    expected = temporal_shapes(places, 64, 33)
    assert len(expected) == 17 and {len(layer) for layer in expected.values()} == {30}
    assert sum(map(total, expected.values())) == 278_575_232
    with torch.device("meta"):
        layers = TemporalLayers.for_unet(UNet2DConditionModel(**SD2))
        assert {m: shapes_of(s) for m, s in official_temporal(layers).items()} == expected
        load_official_temporal(layers, {m: {k: torch.empty(v) for k, v in s.items()} for m, s in expected.items()})


# -- what the weights compute -----------------------------------------------------------------------------------------


def plain_transformer(state, prefix, queries, tokens, layers, heads):
    """[queries; tokens] -> LN -> pre-norm blocks, head by head -> LN of the queries (card 2.2, 2.4)."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"])

    def linear(x, name):
        return x @ state[f"{prefix}{name}.weight"].T + state[f"{prefix}{name}.bias"]

    queries = state[prefix + queries]
    x = norm(torch.cat([queries.expand(len(tokens), -1, -1), tokens], 1), "ln1")
    for i in range(layers):
        block = f"transformer_blocks.resblocks.{i}."
        y = norm(x, f"{block}ln_1")
        q, k, v = (
            y @ state[f"{prefix}{block}attn.in_proj_weight"].T + state[f"{prefix}{block}attn.in_proj_bias"]
        ).chunk(3, -1)
        d, parts = q.shape[-1] // heads, []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            parts.append((q[..., own] @ k[..., own].transpose(1, 2) / d**0.5).softmax(-1) @ v[..., own])
        x = x + linear(torch.cat(parts, -1), f"{block}attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc")), f"{block}mlp.c_proj")
    return norm(x[:, : queries.shape[1]], "ln2")


def plain_scale(state, prefix, features):
    hidden = F.gelu(features @ state[f"{prefix}.0.weight"].T + state[f"{prefix}.0.bias"])
    return 1 + torch.tanh(hidden @ state[f"{prefix}.2.weight"].T + state[f"{prefix}.2.bias"])[..., 0]


def plain_videocrafter(state, image, text):
    """Style tokens B S D, and the scale of each layer B N, both as the card has them."""
    style = (
        plain_transformer(state, "image_context_model.", "style_emb", image, 2, 2) @ state["image_context_model.proj"]
    )
    features = plain_transformer(state, "scale_predictor.", "scale_emb", torch.cat([style, text], 1), 1, 2)
    return style, plain_scale(state, "scale_predictor.out", features)


def plain_sdxl(state, image, text):
    style = (
        plain_transformer(state, "image_context_model.", "query_emb", image, 2, 4) @ state["image_context_model.proj"]
    )
    words = text @ state["scale_predictor.text_proj.weight"].T + state["scale_predictor.text_proj.bias"]
    small = style @ state["scale_predictor.style_proj.weight"].T + state["scale_predictor.style_proj.bias"]
    prefix = "scale_predictor.scale_predictor."
    features = plain_transformer(state, prefix, "query_emb", torch.cat([words, small], 1), 1, 2)
    return style, plain_scale(state, "scale_predictor.out_proj", features @ state[f"{prefix}proj"])


VARIANTS = pytest.mark.parametrize(
    "config,size,shapes,plain",
    [
        (TINY_SD2, TINY_SIZE, TINY_VIDEOCRAFTER_SHAPES, plain_videocrafter),
        (TINY_SDXL, TINY_SDXL_SIZE, TINY_SDXL_SHAPES, plain_sdxl),
    ],
    ids=["VideoCrafter1", "SDXL"],
)


@VARIANTS
@torch.no_grad()
def test_released_weights_mean_the_same_here(config, size, shapes, plain):
    unet = UNet2DConditionModel(**config)
    adapter, state = StyleAdapter(unet, IMAGE, size), drawn(shapes)
    load_official_adapter(adapter, unet, state)
    image, text = torch.randn(2, 5, IMAGE), torch.randn(2, 7, 12)
    tokens, scales = plain(state, image, text)
    actual = adapter(image, text)
    torch.testing.assert_close(actual.tokens, tokens, atol=1e-4, rtol=1e-4)

    # the released order of the layers, by the path of each in diffusers' UNet
    if plain is plain_sdxl:
        order = [n.removesuffix(".processor") for n in unet.attn_processors if "attn2" in n]
        names = [f"kv_attn_layers.{2 * j + 1}" for j in range(len(order))]
        assert order[-1].startswith("mid_block")
    else:
        down, up = ("down_blocks.0", "down_blocks.1"), ("up_blocks.1", "up_blocks.2")
        order = [f"{b}.attentions.{j}" for b in down for j in (0, 1)] + ["mid_block.attentions.0"]
        order += [f"{b}.attentions.{j}" for b in up for j in (0, 1, 2)]
        order = [f"{name}.transformer_blocks.0.attn2" for name in order]
        names = list(dict.fromkeys(n.rsplit(".", 2)[0] for n in state if n.startswith("kv_attn")))
    ours = list(cross_attentions(unet))
    assert sorted(ours) == sorted(order)
    attach_style(unet, adapter.layers)
    for j, (path, name) in enumerate(zip(order, names, strict=True)):
        processor = unet.get_submodule(path).processor
        for weight in ("to_k_style.weight", "to_v_style.weight", "norm_style.weight", "norm_style.bias"):
            assert torch.equal(processor.layer.state_dict()[weight], state[f"{name}.{weight}"])
        torch.testing.assert_close(actual.scale[:, processor.index], scales[:, j], atol=1e-5, rtol=1e-4)
    assert scales.std(1).min() > 0.01  # a wrong order would have shown


@VARIANTS
def test_adapter_files_come_back_value_by_value(config, size, shapes, plain, tmp_path):
    unet, state = UNet2DConditionModel(**config), drawn(shapes)
    adapter = StyleAdapter(unet, IMAGE, size)
    for name, save in (
        ("plain.pth", lambda path: torch.save(state, path)),
        ("wrapped.ckpt", lambda path: torch.save({"state_dict": state}, path)),
        ("other.safetensors", lambda path: save_file(state, path)),
    ):
        for parameter in adapter.parameters():
            nn.init.zeros_(parameter)
        save(tmp_path / name)
        read_adapter(tmp_path / name, adapter, unet)
        back = official_adapter(adapter, unet)
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    write_adapter(tmp_path / "written.pth", adapter, unet)
    written = torch.load(tmp_path / "written.pth", weights_only=True)
    assert written.keys() == state.keys() and all(torch.equal(written[k], state[k]) for k in state)
    assert not any(v.requires_grad for v in written.values())


def tiny_temporal():
    places = [("init_attn.0", 16), *((f"{place}.2", width) for place, width in tiny_places())]
    layers = TemporalLayers.for_unet(UNet2DConditionModel(**TINY_SD2), reach=4)
    return layers, {place: drawn(layer) for place, layer in temporal_shapes(places, 8, 9).items()}


@pytest.mark.parametrize("wrapped", [True, False])
def test_temporal_files_come_back_value_by_value(tmp_path, wrapped):
    layers, state = tiny_temporal()
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "temporal.pth")
    read_temporal(tmp_path / "temporal.pth", layers)
    write_temporal(tmp_path / "written.pth", layers)
    written = torch.load(tmp_path / "written.pth", weights_only=True)
    assert written.keys() == state.keys()
    for place, layer in state.items():
        assert written[place].keys() == layer.keys()
        assert all(torch.equal(written[place][k], layer[k]) for k in layer)
    down = layers["down_blocks.1.attentions.0"].proj_in.weight
    assert torch.equal(down, state["input_blocks.4.2"]["proj_in.weight"])


# -- mistakes ---------------------------------------------------------------------------------------------------------


def refusal(call, *args):
    before = {k: v.clone() for k, v in args[1].state_dict().items()}
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in args[1].state_dict().items())
    return str(caught.value)


def test_wrong_adapter_files_are_one_line_that_lists_what_is_wrong(tmp_path):
    unet, state = UNet2DConditionModel(**TINY_SD2), drawn(TINY_VIDEOCRAFTER_SHAPES)
    adapter, path = StyleAdapter(unet, IMAGE, TINY_SIZE), tmp_path / "adapter.pth"
    gone = [k for k in state if "resblocks.1." in k]
    broken = {k: v for k, v in state.items() if k not in gone}
    broken |= {"image_context_model.query_emb": torch.zeros(1), "scale_predictor.out.2.bias": torch.zeros(3)}
    torch.save(broken, path)
    message = refusal(read_adapter, path, adapter, unet)
    assert str(path) in message and f"12 missing ({gone[0]}, {gone[1]}, {gone[2]}, {gone[3]}, ...)" in message
    assert "1 unknown (image_context_model.query_emb)" in message
    assert "1 of another shape (scale_predictor.out.2.bias (3,) for (1,))" in message

    torch.save(drawn(TINY_SDXL_SHAPES), path)
    assert "missing (image_context_model.style_emb" in refusal(read_adapter, path, adapter, unet)
    wider = UNet2DConditionModel(**TINY_SD2 | {"cross_attention_dim": 16})
    torch.save(state, path)
    assert "of another shape" in refusal(read_adapter, path, StyleAdapter(wider, IMAGE, TINY_SIZE), wider)
    torch.save(state | {"scale_predictor.scale_emb": "text"}, path)
    assert "scale_predictor.scale_emb str for (1, 11, 12)" in refusal(read_adapter, path, adapter, unet)


def test_wrong_temporal_files_are_one_line_that_lists_what_is_wrong(tmp_path):
    layers, state = tiny_temporal()
    path = tmp_path / "temporal.pth"
    del state["middle_block.2"], state["init_attn.0"]["norm.bias"]
    state["output_blocks.9.2"] = {"norm.weight": torch.zeros(16)}
    torch.save(state, path)
    message = refusal(read_temporal, path, layers)
    assert "31 missing (" in message and "1 unknown (output_blocks.9.2.norm.weight)" in message
    torch.save({f"{m}.{k}": v for m, layer in state.items() for k, v in layer.items()}, path)
    assert "are no temporal layers" in refusal(read_temporal, path, layers)


def test_files_that_are_no_weights_are_refused_and_run_nothing(tmp_path):
    unet = UNet2DConditionModel(**TINY_SD2)
    adapter, ran = StyleAdapter(unet, IMAGE, TINY_SIZE), tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return open, (str(ran), "w")

    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("code.pth", "list.pth", "text.pth", "text.safetensors", "gone.pth"):
        assert name in refusal(read_adapter, tmp_path / name, adapter, unet)
    assert not ran.exists()
