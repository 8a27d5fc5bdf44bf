"""Released tokenizers to compare with: out of pinned packages, read as data and never run, good for counting only."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import sentencepiece
import tiktoken

from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.errors import UserError, require
from llm_jax.tokenization import tiktoken_file
from llm_jax.tokenization.report import Measurable
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.tiktoken_file import TiktokenTokenizer

MISTRAL = Package(
    "mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af", 6589302
)
LITELLM = Package(
    "litellm", "1.109.1", "1c8b4dd671fa0cd0850aa751678704ff77e595fb1e6085b2dc3be39ee19bdaaf", 41091727, "platform_wheel"
)
DASHSCOPE = Package("dashscope", "2.0.2", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258", 2425551)

# How text is split before merging, which the files do not say: as the tiktoken library has it.
CL100K_SPLIT = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}+",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s++$",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s",
    )
)
SMALL, CAPITAL = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
BEFORE, AFTER = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = "|".join(
    (
        f"{BEFORE}[{CAPITAL}]*[{SMALL}]+{AFTER}",
        f"{BEFORE}[{CAPITAL}]+[{SMALL}]*{AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class ByteRanks:
    """A tiktoken file under some rules of splitting, without control tokens."""

    def __init__(self, ranks: bytes, name: str, split: str):
        """Load from the bytes of a file; `UserError` naming `name` where they are not a usable one."""
        tokens = tiktoken_file.parse_ranks(ranks, name)
        self.vocab_size = len(tokens)
        self._encoding = tiktoken.Encoding(
            name, pat_str=split, mergeable_ranks={token: rank for rank, token in enumerate(tokens)}, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        return self._encoding.decode_bytes(list(ids))


class LossyPieces:
    """A SentencePiece model as the library alone reads it: also one that loses text, which no model should be given."""

    def __init__(self, model: bytes):
        """Load from the bytes of a model file."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; characters without a piece become the unknown one, a run of them a single one."""
        return self._processor.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text that ids are written as."""
        return self._processor.decode(list(ids)).encode()


@dataclasses.dataclass(frozen=True)
class Published:
    """A released tokenizer: `file` in `package`, of which `read(content, name)` makes one."""

    title: str
    package: Package
    file: str
    read: Callable[[bytes, str], Measurable]


_FOLDER = "litellm/litellm_core_utils/tokenizers"  # whose files have the names that tiktoken's cache gives them
PUBLISHED = {
    "mistral": Published(
        "Mistral 7B (LLaMA's kind)", MISTRAL, "mistral_common/data/tokenizer.model.v1", SentencePieceTokenizer
    ),
    "cl100k": Published(
        "cl100k", LITELLM, f"{_FOLDER}/9b5ad71b2ce5302211f9c61530b329a4922fc6a4", partial(ByteRanks, split=CL100K_SPLIT)
    ),
    "qwen": Published("Qwen", DASHSCOPE, "dashscope/resources/qwen.tiktoken", TiktokenTokenizer),
    "o200k": Published(
        "o200k", LITELLM, f"{_FOLDER}/fb374d419588a4632f3f557e76b4b70aebbca790", partial(ByteRanks, split=O200K_SPLIT)
    ),
}


def fetch(name: str, cache: Path) -> Measurable:
    """A tokenizer of `PUBLISHED`, downloaded unless it is in the cache; `UserError` where it cannot be had."""
    wanted = PUBLISHED[name]
    path = fetch_all([wanted.package], cache)[wanted.package.name]
    if isinstance(path, FetchError):
        raise UserError(f"cannot get the tokenizer {name} out of {wanted.package.requirement}: {path}")
    content = next((content for _, content in members(path, wanted.file)), None)
    require(content is not None, f"{wanted.package.requirement} has no file {wanted.file}")
    assert content is not None
    return wanted.read(content, name)
