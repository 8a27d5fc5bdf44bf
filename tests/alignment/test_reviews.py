"""Reviews as prompts and samples: what is on which side, and that both together are the text."""

import dataclasses

import pytest

from llm_jax.alignment import ratings, reviews
from llm_jax.alignment.conversations import Tally
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.steering_config import SteeringConfig
from llm_jax.config import TokenizerConfig
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.train import train_on_texts

CONFIG = SteeringConfig(domains=("movies", "shop_reviews"), judged_fraction=0.2, referee_fraction=0.3)
WORDS = "one two three four five six seven eight nine ten eleven twelve"


def text(said, language="en", domain="movies"):
    return RatedText(said, 1.0, (), domain, language, "")


TEXTS = [text(f"{WORDS} {i}") for i in range(200)] + [text("很好的酒店，早餐也不错。", "zh", "shop_reviews")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(train_on_texts([each.text for each in TEXTS], TokenizerConfig(vocab_size=320)))
    return tokenizers.load(path)


def test_sides_are_parted_by_the_hash_of_the_text():
    found = reviews.sides([*TEXTS, text("another domain", domain="tweets")], CONFIG)
    for side, low, high in ((found.judged, 0, 0.2), (found.referee, 0.2, 0.5), (found.learned, 0.5, 1)):
        assert side == [each for each in TEXTS if low * HASH_RANGE <= text_hash(each.text) < high * HASH_RANGE]
    with pytest.raises(UserError, match="too few texts of tweets for three sides"):
        reviews.sides(TEXTS, dataclasses.replace(CONFIG, domains=("tweets",)))


def test_the_start_and_the_rest_are_the_text():
    for each in TEXTS:
        start, rest = reviews.begun(each)
        assert start + rest == each.text and start == ratings.first_words(each)[0]
        assert rest.startswith(" ") == (each.language == "en")


def test_prompts_are_different_short_beginnings_of_texts_that_go_on(tokenizer):
    given = [*TEXTS, *TEXTS, text("No more.")]
    found = reviews.prompts_of(given, tokenizer, 24)
    starts = [prompt.messages[-1].content for prompt in found]
    assert len(starts) == len(set(starts)) and set(starts) == {reviews.begun(each)[0] for each in TEXTS}
    assert all(
        list(prompt.tokens) == [tokenizer.bos_id, *tokenizer.encode(start)] for prompt, start in zip(found, starts)
    )
    assert starts == [each.messages[-1].content for each in reviews.prompts_of(given[::-1], tokenizer, 24)]
    longest = max(len(prompt.tokens) for prompt in found)
    assert len(reviews.prompts_of(given, tokenizer, longest - 1)) < len(found)


def test_samples_learn_the_rest_and_its_end(tokenizer):
    tally = Tally()
    found = reviews.samples_of([TEXTS[0], TEXTS[-1], text("No more.")], tokenizer, 100, tally)
    assert set(found) == {"en", "zh"} and tally.counts == {"nothing to continue": 1}
    for each, (sample,) in ((TEXTS[0], found["en"]), (TEXTS[-1], found["zh"])):
        learned = sample.tokens[sample.weights > 0].tolist()
        assert tokenizer.decode(sample.tokens[1:-1].tolist()) == each.text and learned[-1] == tokenizer.eos_id
        assert tokenizer.decode_bytes(learned[:-1]).decode() == reviews.begun(each)[1]
    most = int(found["en"][0].weights.sum())
    assert reviews.samples_of(TEXTS[:1], tokenizer, most, tally) and not reviews.samples_of(
        TEXTS[:1], tokenizer, most - 1, tally
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("films",)}, "domains='films' is not one of"),
        ({"referee_fraction": 0.8}, "leave no text to learn from"),
        ({"seeds": ()}, r"seeds=\(\) must be some different ones"),
        ({"best_of": (1, 64)}, r"must be from 1 to best_of_samples=32"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
