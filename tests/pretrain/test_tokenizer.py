"""The tokenizer: a token a word of the world, and characters for the rest."""

from pathlib import Path

from transformers import CLIPTokenizer

from lit_gen.pretrain.tokenizer import MAX_LENGTH, build_tokenizer
from lit_gen.world.grammar import vocabulary_words


def test_every_word_of_the_world_is_one_token(tmp_path: Path) -> None:
    build_tokenizer(vocabulary_words()).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in vocabulary_words():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert len(tokenizer("a red zeppelin").input_ids) > 5  # falls apart, but is not lost
    assert tokenizer("a red ball", padding="max_length").input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == MAX_LENGTH


def test_the_bundled_tokenizer_knows_the_grammar() -> None:
    bundled = CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "data" / "world-base" / "tokenizer")
    assert [w for w in vocabulary_words() if bundled.tokenize(w) != [w + "</w>"]] == []
