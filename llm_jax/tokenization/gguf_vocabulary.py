"""The tokenizer inside a GGUF file: a vocabulary with merges (byte-level BPE) or with scores (SentencePiece)."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protocol

from llm_jax import gguf_file
from llm_jax.errors import UserError, require
from llm_jax.tokenization import tiktoken_file
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.tokenizer_json import JsonTokenizer

logger = logging.getLogger(__name__)

# Token types; SentencePiece's codes are the same.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
TYPES = range(1, 7)
ID_KEYS = ("unknown", "bos", "eos", "padding")
ABSENT = "\0"  # a piece that no vocabulary has; SentencePiece takes an empty name for its default
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTE_LEVEL, "use_regex": True}  # GPT-2's own split is the library's


def _split(pattern: str) -> dict[str, Any]:
    """Cut text into the matches of a regular expression, then write bytes as characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


# How text is split before merging: the file only names it.
PRE_TOKENIZERS = {
    "default": GPT2,
    "gpt-2": GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]},
    "llama-bpe": _split(tiktoken_file.SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "qwen2": _split(tiktoken_file.SPLIT),
}


def read(file: Path) -> JsonTokenizer | SentencePieceTokenizer:
    """The tokenizer of a GGUF file; `UserError` where it has none, or one of an unknown kind."""
    metadata = gguf_file.read(file).metadata
    _check_types(metadata, str(file))
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    require(kind is not None and bool(tokens), f"{file} holds no tokenizer")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    require(len(types) == len(tokens), f"{file}: tokenizer.ggml.token_type has {len(types)} of {len(tokens)} entries")
    for key in ID_KEYS:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id", 0)
        require(-1 <= value < len(tokens), f"{file}: tokenizer.ggml.{key}_token_id={value} is outside the vocabulary")
    if kind == "gpt2":
        return _byte_level(metadata, tokens, types, str(file))
    if kind == "llama":
        return SentencePieceTokenizer(_sentencepiece(metadata, tokens, types, str(file)), str(file))
    raise UserError(f"{file} has a tokenizer of the kind {kind!r}; gpt2 and llama can be read")


def _check_types(metadata: Mapping[str, Any], name: str) -> None:
    """Refuse values of other types than the format gives these keys."""
    ids = {f"{key}_token_id": int for key in ID_KEYS}
    switches = dict.fromkeys(("add_bos_token", "add_space_prefix", "remove_extra_whitespaces"), bool)
    for key, wanted in {"model": str, "pre": str, **ids, **switches}.items():
        value = metadata.get(f"tokenizer.ggml.{key}")
        right = value is None or type(value) is wanted
        require(right, f"{name}: tokenizer.ggml.{key} is {value!r}, not of type {wanted.__name__}")
    for key, wanted in {"tokens": str, "token_type": int, "scores": float, "merges": str}.items():
        values = metadata.get(f"tokenizer.ggml.{key}")
        right = values is None or (isinstance(values, list) and all(type(value) is wanted for value in values))
        require(right, f"{name}: tokenizer.ggml.{key} is not a list of type {wanted.__name__}")
    code = next((kind for kind in metadata.get("tokenizer.ggml.token_type") or () if kind not in TYPES), None)
    require(code is None, f"{name}: tokenizer.ggml.token_type has {code}, which is no type of token")


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> JsonTokenizer:
    split = metadata.get("tokenizer.ggml.pre", "default")
    known = ", ".join(PRE_TOKENIZERS)
    require(split in PRE_TOKENIZERS, f"{name} splits text in the unknown way {split!r}; known: {known}")
    if split == "default":
        logger.warning("%s does not say how its tokenizer splits text; splitting it as GPT-2 does", name)
    added = [
        {"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, (token, kind) in enumerate(zip(tokens, types)) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    model = {
        "type": "BPE",
        "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == NORMAL},
        "merges": [merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges", ())],
        "ignore_merges": split == "llama-bpe",
    }
    definition = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[split],
        "post_processor": None,
        "decoder": GPT2,
        "model": model,
    }
    begins = metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for key in ("bos", "eos", "padding")]
    return JsonTokenizer(json.dumps(definition), ids[0] if begins else -1, ids[1], ids[2], name)


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> bytes:
    """The SentencePiece model that the file's vocabulary was taken from, rebuilt."""
    scores = metadata.get("tokenizer.ggml.scores", ())
    require(len(scores) == len(tokens), f"{name}: tokenizer.ggml.scores has {len(scores)} of {len(tokens)} entries")
    proto: Any = protocol.ModelProto()  # type: ignore[attr-defined]
    for token, score, kind in zip(tokens, scores, types):
        proto.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), BYTE in types
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    defaults = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
    for piece, key in defaults.items():
        i = metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
        absent = i < 0 or (piece == "bos" and not metadata.get("tokenizer.ggml.add_bos_token", True))
        setattr(trainer, f"{piece}_piece", ABSENT if absent else tokens[i])
    return proto.SerializeToString()
