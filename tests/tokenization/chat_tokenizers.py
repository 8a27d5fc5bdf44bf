"""Small tokenizers to talk with, of every kind that chat formats are used with."""

import functools
import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as protocol

from llm_jax.config import TokenizerConfig
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.tokenizer_json import JsonTokenizer
from llm_jax.tokenization.train import train_on_texts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text())
TEXTS = ["What is the capital of France? [INST] Paris <<SYS>> [/INST] <</SYS>>\n\n一二三 system user assistant\n"] * 3


@functools.cache
def sentencepieces():
    """Tokenizers of LLaMA-2's kind (a space before every text) and of Baichuan-2's (none, and reserved pieces)."""
    llama = train_on_texts(TEXTS, TokenizerConfig(vocab_size=310, style="llama2"))
    model = protocol.ModelProto.FromString(train_on_texts(TEXTS, TokenizerConfig(vocab_size=310, style="baichuan2")))
    for i, name in ((300, "<reserved_106>"), (301, "<reserved_107>")):
        model.pieces[i].piece, model.pieces[i].type = name, model.pieces[i].USER_DEFINED
    return {"llama2": SentencePieceTokenizer(llama), "baichuan2": SentencePieceTokenizer(model.SerializeToString())}


def golden_tokenizer(kind):
    stored = GOLDEN["tokenizers"][kind]
    return JsonTokenizer(stored["definition"], stored["bos"], stored["eos"])


BYTE_LEVEL, BYTE_FALLBACK = golden_tokenizer("byte_level"), golden_tokenizer("byte_fallback")


class Bytes:
    """One id a byte, from 300 on; below are control tokens, some with names. Ids can be written down by hand."""

    vocab_size = 556
    special_ids = {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}  # noqa: RUF012
    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, text):
        return [300 + byte for byte in text.encode()]

    def decode_bytes(self, ids):
        return bytes(i - 300 for i in ids if i >= 300)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")
