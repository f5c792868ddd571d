"""Text, picture and style conditions."""

import logging

import pytest
import torch
import torch.nn.functional as F

from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.image_prompt import ScalePredictor, StyleExtractor, encode_image
from lit_gen.diffusion.text import encode_text, tokenize
from lit_gen.errors import UserError


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base), parts=("tokenizer", "text_encoder", "image_encoder"))


def test_prompts_that_are_too_long_are_cut_with_one_warning_or_refused(base, caplog, monkeypatch):
    monkeypatch.setattr("lit_gen.diffusion.text._told", [])
    length = base.tokenizer.model_max_length
    long = " ".join(["red"] * 2 * length)
    with caplog.at_level(logging.WARNING):
        ids = tokenize(base.tokenizer, ["a ball", long, long])
    assert ids.shape == (3, length)
    assert caplog.text.count(f"longer than the {length - 2}") == 1
    truncated = base.tokenizer([long], truncation=True, max_length=length).input_ids[0]
    assert ids[1].tolist() == truncated
    with pytest.raises(UserError, match="longer than"):
        tokenize(base.tokenizer, [long], strict=True)


def test_text_states_are_the_encoders_last_layer(base):
    states = encode_text(base.tokenizer, base.text_encoder, ["a red ball", "a blue cube"])
    assert not states.requires_grad and not torch.allclose(states[0], states[1])
    assert states.shape == (2, base.tokenizer.model_max_length, base.text_encoder.config.hidden_size)


def test_image_tokens_are_the_normed_class_token_and_raw_patches(base):
    images = torch.rand(2, 3, 80, 80) * 2 - 1
    encoder, processor = base.image_encoder, base.image_processor
    tokens = encode_image(encoder, processor, images)
    size = encoder.config.image_size
    pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    output = encoder.vision_model(((pixels + 1) / 2 - mean) / deviation)
    torch.testing.assert_close(tokens[:, 0], output.pooler_output)
    torch.testing.assert_close(tokens[:, 1:], output.last_hidden_state[:, 1:])
    assert not torch.allclose(tokens[:, 0], output.last_hidden_state[:, 0])
    earlier = encode_image(encoder, processor, images, layer=-2)
    assert earlier.shape == tokens.shape and not torch.allclose(earlier, tokens)


def test_extractor_takes_any_number_of_references_in_any_order():
    extractor = StyleExtractor(width=16, out=12, tokens=3, layers=2, heads=2)
    one, two = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    assert extractor(one).shape == (2, 3, 12)
    both = extractor(torch.cat([one, two], 1))
    torch.testing.assert_close(both, extractor(torch.cat([two, one], 1)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, extractor(one), atol=1e-3)
    padding = torch.tensor([[False] * 5 + [True] * 5] * 2)
    padded = extractor(torch.cat([one, two], 1), padding)
    torch.testing.assert_close(padded, extractor(one), atol=1e-5, rtol=1e-5)


def test_paper_sized_modules_have_the_papers_parameter_counts():
    with torch.device("meta"):
        extractor, predictor = StyleExtractor(1280, 1024), ScalePredictor(1024, 16)
    assert sum(p.numel() for p in extractor.parameters()) == 60_358_400
    assert sum(p.numel() for p in predictor.parameters()) == 25_245_761


def test_scales_are_between_0_and_2_and_depend_on_style_and_text():
    predictor = ScalePredictor(width=16, count=6, heads=2)
    with torch.no_grad():
        predictor.out[-1].weight.mul_(5)
    style, text = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    scales = predictor(style, text)
    assert scales.shape == (2, 6) and (scales > 0).all() and (scales < 2).all()
    assert not torch.allclose(scales, predictor(style.flip(0), text), atol=1e-4)
    assert not torch.allclose(scales, predictor(style, text.flip(0)), atol=1e-4)
