"""CLIP scores from a base folder and from a CLIP folder agree, and prefer what belongs together."""

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from lit_gen.errors import UserError
from lit_gen.metrics.clip import CLIPEncoders, CLIPStyleScore, CLIPTextScore
from lit_gen.pretrain.stand_in import write_stand_in


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("clip") / "base")


def test_scores_from_a_base_folder(base):
    encoders = CLIPEncoders(base)
    images, texts = torch.rand(4, 3, 64, 64) * 2 - 1, ["a red ball", "a blue cube", "a cone", "a ring at night"]
    image, text = encoders.embed_image(images), encoders.embed_text(texts)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    score = CLIPTextScore(encoders)
    score.update(images[:2], texts[:2])
    score.update(images[2:], texts[2:])
    torch.testing.assert_close(score.compute(), (image * text).sum(1).mean())
    style = CLIPStyleScore(encoders)
    style.update(images, images)
    torch.testing.assert_close(style.compute(), torch.tensor(1.0))
    video = CLIPTextScore(encoders)
    video.update(images[:, None].expand(-1, 3, -1, -1, -1), texts)
    torch.testing.assert_close(video.compute(), score.compute())
    assert not score.state_dict() and not list(score.parameters())


def test_a_clip_folder_gives_the_same_as_the_towers_it_was_split_into(base, tmp_path):
    split = CLIPEncoders(base)
    config = {"text_config": split.text.config.to_dict(), "vision_config": split.vision.config.to_dict()}
    joint = CLIPModel(CLIPModel.config_class(**config, projection_dim=split.vision.config.projection_dim))
    joint.text_model.load_state_dict(split.text.state_dict(), strict=False)
    joint.vision_model.load_state_dict(split.vision.vision_model.state_dict())
    joint.visual_projection.load_state_dict(split.vision.visual_projection.state_dict())
    torch.nn.init.eye_(joint.text_projection.weight)
    joint.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(base / "tokenizer").save_pretrained(tmp_path)
    whole = CLIPEncoders(tmp_path)
    images = torch.rand(2, 3, 80, 100) * 2 - 1  # resized and cropped
    torch.testing.assert_close(whole.embed_image(images), split.embed_image(images))
    texts = ["a red ball on a cube", "fog"]
    torch.testing.assert_close(whole.embed_text(texts), split.embed_text(texts))


def test_a_folder_without_clip_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a CLIP folder nor a base"):
        CLIPEncoders(tmp_path)
