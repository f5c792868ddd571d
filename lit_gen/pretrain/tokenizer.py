"""A CLIP tokenizer in which every word of the world is one token."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 40  # the longest full caption has 32 words; two special tokens and room for a user's own words


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Byte-pair tokenizer of the CLIP kind, its merges learned from `words` until each is a single token.

    Words that are not among them fall apart into characters, so any prompt can be encoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted({w for phrase in words for w in phrase.lower().split()}), trainer)
    merges = [tuple(m) if isinstance(m, (list, tuple)) else tuple(m.split(" ")) for m in _merges(learner)]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    # transformers warns about every tokenizer that was not downloaded; this one is made here
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
        pad_token="<|endoftext|>",
    )


def _merges(tokenizer: Tokenizer) -> list[list[str] | str]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


if __name__ == "__main__":
    import sys

    from lit_gen.world.grammar import vocabulary_words

    build_tokenizer(vocabulary_words()).save_pretrained(sys.argv[1])
