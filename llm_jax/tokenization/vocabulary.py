"""What the kinds of tokenizers share: checking what goes in, and joining the bytes that ids stand for."""

from collections.abc import Iterable, Sequence

from llm_jax.errors import UserError, require


def check_text(text: str) -> None:
    """Raise `UserError` if the string holds a lone surrogate, which no UTF-8 text does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text with a lone surrogate at character {error.start} has no UTF-8 form") from None


def join_bytes(surfaces: Sequence[bytes], ids: Iterable[int], name: str) -> bytes:
    """The bytes that ids stand for; `UserError` naming the tokenizer `name` for an id without an entry."""
    ids = list(ids)
    outside = next((i for i in ids if not 0 <= i < len(surfaces)), None)
    require(outside is None, f"id {outside} is outside the vocabulary of {len(surfaces)} of {name}")
    return b"".join([surfaces[i] for i in ids])
