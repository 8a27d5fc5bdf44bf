"""Reviews that people rated as prompts, their first words, and as what a model learns to continue them with."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llm_jax.alignment import dpo, prompts, ratings
from llm_jax.alignment.conversations import BadRecordError, Tally
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.sft import TOO_LONG, Sample
from llm_jax.alignment.steering_config import SteeringConfig
from llm_jax.data.documents import text_hash
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message
from llm_jax.tokenization.tokenizer import Tokenizer


class Sides(NamedTuple):
    """Which texts are for what; a text is on one side only."""

    learned: list[RatedText]  # by the policy before it is paid, and by the reward model
    referee: list[RatedText]  # from these the unpaid regressor learns, and their first words are prompts
    judged: list[RatedText]  # by their first words all are judged


def sides(rated: Iterable[RatedText], config: SteeringConfig) -> Sides:
    """The texts of the config's domains, apart. Raises `UserError` where a side has none."""
    learned, others = ratings.split((text for text in rated if text.domain in config.domains), config.held_out)
    found = Sides(learned, *ratings.split(others, config.judged_fraction))
    require(all(found), f"too few texts of {', '.join(config.domains)} for three sides: {[*map(len, found)]}")
    return found


def begun(text: RatedText) -> tuple[str, str]:
    """(the first words, the rest with the space before it)."""
    start, _ = ratings.first_words(text)
    return start, text.text[len(start) :]


def prompts_of(texts: Iterable[RatedText], tokenizer: Tokenizer, max_tokens: int) -> list[Prompt]:
    """The different first words of texts that go on, in an order of their own; those of more tokens are left out."""
    starts = {start for start, rest in map(begun, texts) if rest.strip()}
    ordered = sorted(starts, key=text_hash)  # so that the first ones are of all languages and domains
    asked = [Prompt((Message("user", start),), (), record=f"prompt {i}") for i, start in enumerate(ordered, start=1)]
    return prompts.tokenize_all(asked, tokenizer, None, max_tokens, Tally())


def samples_of(
    texts: Sequence[RatedText], tokenizer: Tokenizer, max_new_tokens: int, tally: Tally
) -> dict[str, list[Sample]]:
    """What continues first words, by language: only rests that a response may hold, so that responses learn to end."""
    found: dict[str, list[Sample]] = {}
    for text in texts:
        start, rest = begun(text)
        try:
            if not rest.strip():
                raise BadRecordError("nothing to continue")
            sample = dpo.encode_response((Message("user", start),), rest, tokenizer, None, 0)
            if sample.weights.sum() > max_new_tokens:
                raise BadRecordError(TOO_LONG, f"{sample.weights.sum():.0f} tokens for {max_new_tokens}")
        except BadRecordError as error:
            tally.add(error.reason, text.record, error.detail)
            continue
        found.setdefault(text.language, []).append(sample)
    return found
