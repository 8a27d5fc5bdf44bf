"""Texts that tokenizers are trained on in tests, and strategies for what they have to stand."""

import json

from hypothesis import strategies as st

from llm_jax.tokenization.sentencepiece_model import SPACE_MARK

CODE = (
    "def add(first, second):\n    # the sum\n\tif first == 12345:\n        return None\n\n\n    return first + second\n"
)
CHINESE = "第一条　为了保护公民的合法权益，制定本法。\n第二条  公民在法律面前一律平等。\n\n"
ENGLISH = "The quick brown fox jumps over the lazy dog; it was the best of times, in 1984.  Two spaces.\n"
TEXTS = [CODE, CHINESE, ENGLISH, CODE + CHINESE, ENGLISH * 3]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Text in which adjacent characters often form pieces, among anything else that UTF-8 can hold.
MARKS = [" ", "   ", "\n", "\n\n", "\t", "\0", SPACE_MARK, "<s>", "</s>", "<0x41>", *SPECIALS]
familiar = st.sampled_from([CODE, CHINESE, ENGLISH, *MARKS])
words = st.sampled_from(sorted({word for text in TEXTS for word in text.split()}))
fragments = familiar | words | st.text(max_size=8)
any_text = st.one_of(st.text(), st.lists(fragments, max_size=8).map("".join))


def byte_level_bpe(pre_tokenizer=None, size=400):
    """The JSON of a byte-level BPE with SPECIALS at its first ids, trained by the `tokenizers` package."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    return json.loads(trained.to_str())
