"""A tokenizer of bytes: an id for each of them, and Baichuan-2's control tokens. For small models and short texts.

It is a byte-level BPE without merges, so it is kept and read as any tokenizer.json.
"""

import json

from llm_jax.tokenization.tokenizer_json import ALPHABET, JsonTokenizer

# Where they stand in Baichuan-2's vocabulary, so that its chat format, the shortest, fits.
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<reserved_106>": 195, "<reserved_107>": 196}
VOCABULARY = 256 + len(SPECIALS)


def build() -> JsonTokenizer:
    """The tokenizer, always the same: the bytes in order on the ids that no control token has. No bos."""
    free = [i for i in range(VOCABULARY) if i not in SPECIALS.values()]
    characters = sorted(ALPHABET, key=ALPHABET.__getitem__)
    definition = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False,
            }
            for name, i in SPECIALS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": SPECIALS | dict(zip(characters, free)), "merges": []},
    }  # fmt: skip
    return JsonTokenizer(json.dumps(definition), eos_id=SPECIALS["</s>"], pad_id=SPECIALS["<unk>"], name="bytes")
