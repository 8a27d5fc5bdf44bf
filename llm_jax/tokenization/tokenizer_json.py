"""Tokenizers of the `tokenizers` package: byte-level or byte-fallback BPE out of a `tokenizer.json`.

The file says how text is encoded, but its library also turns text that looks like a control token into that token.
Here control tokens are taken out before encoding, so that no text can speak in their name.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llm_jax.errors import UserError, require
from llm_jax.tokenization.vocabulary import check_text, join_bytes

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
# Where checkpoints without a tokenizer_config.json say which ids begin and end documents.
MODEL_CONFIGS = ("generation_config.json", "config.json")
SPACE_MARK = "\u2581"
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
MAX_IDS = 1 << 24  # a larger id is damage, not a vocabulary


class JsonTokenizer:
    """A loaded `tokenizer.json`; safe to share between threads and to pickle into other processes."""

    def __init__(self, definition: str, bos_id: int = -1, eos_id: int = -1, pad_id: int = -1, name: str = ""):
        """Load from the text of a file.

        Args:
          definition: the file's JSON.
          bos_id: the id that begins a document; -1 = none.
          eos_id: the id that ends one; -1 = none.
          pad_id: the padding id; -1 = `eos_id`.
          name: what to call it in errors.

        Raises:
          UserError: it is damaged, or not a BPE that can write every byte.
        """
        self._arguments = (definition, bos_id, eos_id, pad_id, name)
        self._name = name or "the tokenizer"
        content = _parse(definition, self._name)
        self.special_ids = {t["content"]: t["id"] for t in content.get("added_tokens") or () if t["special"]}
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = pad_id if pad_id >= 0 else eos_id
        self._encoder = _build(_without_specials(content, set(self.special_ids)), self._name)
        self._surfaces = _surfaces(content, self._name)
        self._prefix = b" " if _adds_prefix(content) else b""
        for kind, wrong in (("bos", bos_id), ("eos", eos_id), ("pad", pad_id)):
            require(wrong < self.vocab_size, f"{self._name}: {kind} id {wrong} is outside the vocabulary")

    def __reduce__(self) -> tuple[type["JsonTokenizer"], tuple[Any, ...]]:
        return JsonTokenizer, self._arguments

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, control tokens included."""
        return len(self._surfaces)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of the definition and the ids of the specials: the same for the same tokenizer only."""
        return hashlib.sha256(json.dumps(self._arguments[:4]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos; text that looks like a control token is encoded as text.

        Raises `UserError` if the string holds a lone surrogate, which no UTF-8 text does.
        """
        check_text(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """`encode` of every text: one by one if `workers` is 1, else on the library's own threads."""
        if workers == 1:
            return [self.encode(text) for text in texts]
        for text in texts:
            check_text(text)
        return [row.ids for row in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; bytes that form no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids, also where they stop in the middle of a character; specials add none.

        Raises `UserError` for an id outside the vocabulary.
        """
        return join_bytes(self._surfaces, ids, self._name).removeprefix(self._prefix)

    def save(self, folder: Path) -> Path:
        """Write tokenizer.json and tokenizer_config.json into a folder that exists; returns the former's path."""
        names = {i: token for token, i in self._vocabulary().items()}
        config = {f"{kind}_token": names.get(getattr(self, f"{kind}_id")) for kind in ("bos", "eos", "pad")}
        (folder / CONFIG_NAME).write_text(json.dumps(config | {"add_bos_token": self.bos_id >= 0}, indent=2) + "\n")
        path = folder / FILE_NAME
        path.write_text(self._arguments[0], encoding="utf-8")
        return path

    def _vocabulary(self) -> dict[str, int]:
        return self._encoder.get_vocab() | self.special_ids


def read(file: Path) -> JsonTokenizer:
    """Open a tokenizer.json with the specials that the JSON files beside it name; `UserError` where it is damaged."""
    definition = file.read_text(encoding="utf-8", errors="replace")
    content = _parse(definition, str(file))
    ids = content["model"]["vocab"] | {t["content"]: t["id"] for t in content.get("added_tokens") or ()}
    config = read_json(file.with_name(CONFIG_NAME))
    bos, eos, pad = (_special_id(kind, config, ids, file.parent) for kind in ("bos", "eos", "pad"))
    begins = config.get("add_bos_token")
    if begins is None:
        begins = _build(content, str(file)).encode("a").ids[:1] == [bos]
    return JsonTokenizer(definition, bos if begins else -1, eos, pad, str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file; `UserError` where it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); is it cut short?") from None
    require(isinstance(content, dict), f"{file} is not a JSON object")
    return content


def _special_id(kind: str, config: Mapping[str, Any], ids: Mapping[str, int], folder: Path) -> int:
    """The id of the bos, eos or pad token: by name in the tokenizer's config, else by id in the model's."""
    if f"{kind}_token" in config:
        return _named_id(f"{kind}_token", config[f"{kind}_token"], ids, folder / CONFIG_NAME)
    for name in MODEL_CONFIGS:
        value = read_json(folder / name).get(f"{kind}_token_id")
        if value is not None:
            first = value[0] if isinstance(value, list) and value else value
            require(
                type(first) is int and first >= -1, f"{folder / name}: {kind}_token_id is {value!r}, which is no id"
            )
            return first
    return -1


def _named_id(key: str, value: Any, ids: Mapping[str, int], file: Path) -> int:
    """The id of a token that a file names, as text or as an object; -1 where it names none that there is."""
    if value is None:
        return -1
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str):
        raise UserError(f"{file}: {key} is {value!r}, which names no token")
    if token not in ids:
        logger.warning("%s: %s is %r, which is not in the vocabulary; going on without", file, key, token)
    return ids.get(token, -1)


def _parse(definition: str, name: str) -> dict[str, Any]:
    """The definition's content, if it is of a kind that loses no text."""
    try:
        content = json.loads(definition)
        model = content["model"]
        kind = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{name} is not a tokenizer.json (damaged or cut short)") from None
    _check_shape(content, name)
    require(kind == "BPE", f"{name} cannot be used: it is a {kind} model, and only BPE is supported")
    lossless = "ByteLevel" in _types(content.get("decoder")) or model.get("byte_fallback")
    require(bool(lossless), f"{name} cannot be used: it has neither byte-level tokens nor byte fallback")
    return {"decoder": None, **content}


def _check_shape(content: Mapping[str, Any], name: str) -> None:
    """Refuse a vocabulary or added tokens of another shape than the format gives them."""
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
    kind = content["model"].get("type", "BPE")
    whole = isinstance(vocabulary, dict) and bool(vocabulary) and all(map(_is_id, vocabulary.values()))
    require(whole or kind != "BPE", f"{name} is damaged: model.vocab is not an object of ids by token")
    shape = {"content": str, "special": bool}
    whole = isinstance(added, list) and all(
        isinstance(token, dict)
        and _is_id(token.get("id"))
        and all(type(token.get(key)) is wanted for key, wanted in shape.items())
        for token in added
    )
    require(whole, f"{name} is damaged: added_tokens is not a list of tokens with id, content and special")


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _build(content: Mapping[str, Any], name: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} cannot be used: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_specials(content: Mapping[str, Any], specials: set[str]) -> dict[str, Any]:
    """The definition of a tokenizer to which control tokens are ordinary text."""
    model = dict(content["model"])
    if model.get("ignore_merges"):  # whole words are looked up in the vocabulary, where a special may stand
        keep = {model.get("unk_token")}
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in specials - keep}
    added = [token for token in content.get("added_tokens") or () if not token["special"]]
    return {**content, "model": model, "added_tokens": added, "post_processor": None}


def _types(part: Any) -> Iterator[str]:
    """The types of a pre-tokenizer or decoder and of those it is composed of."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.values():
            yield from _types(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _types(inner)


def _adds_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text that is encoded, and taken off a text that is decoded."""
    decoder = json.dumps(content["decoder"])
    strips = '"type": "Strip"' in decoder and '"start": 1' in decoder
    return strips or ("Metaspace" in _types(content["decoder"]) and '"prepend_scheme": "never"' not in decoder)


def _surfaces(content: Mapping[str, Any], name: str) -> list[bytes]:
    """The bytes that each id stands for: none for control tokens and for ids that nothing has."""
    vocabulary: dict[str, int] = content["model"]["vocab"]
    added = content.get("added_tokens") or ()
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    require(size <= MAX_IDS, f"{name} is damaged: it has an id of {size - 1}")
    surfaces = [b""] * size
    byte_level = "ByteLevel" in _types(content["decoder"])
    for token, i in vocabulary.items():
        surfaces[i] = byte_level_surface(token) if byte_level else _fallback_surface(token)
    for token in added:
        surfaces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return surfaces


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it prints, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def byte_level_surface(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; a token outside its alphabet stands for its own text."""
    try:
        return bytes([ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _fallback_surface(token: str) -> bytes:
    if BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()
