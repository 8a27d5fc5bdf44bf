"""Two responses to a prompt, from different models or temperatures."""

from collections import Counter

import pytest

from llm_jax.alignment.candidates import Variant, respond_twice
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

PROMPTS = [(Message("user", f"question {i}"),) for i in range(60)]


def model(name, calls=None, **options):
    """A model whose reply tells where it comes from."""

    def sample(prompts, temperature, seed):
        if calls is not None:
            calls.append((name, temperature, seed, len(prompts)))
        return [f"{name} at {temperature} to {prompt[-1].content}" for prompt in prompts]

    return Variant(name, sample, **options)


def test_responses_come_from_two_models_at_their_temperatures():
    calls = []
    variants = [model("a", calls), model("b", calls, temperatures=(0.0, 0.5)), model("c", calls)]
    found, tally = respond_twice(PROMPTS, variants, seed=3)
    assert [candidates.prompt for candidates in found] == PROMPTS and not tally.counts
    for candidates in found:
        said = [f"{name} at {t} to {candidates.prompt[-1].content}" for name, t in candidates.origins]
        assert list(candidates.responses) == said
        assert candidates.origins[0][0] != candidates.origins[1][0]
    used = Counter(origin for candidates in found for origin in candidates.origins)
    assert set(used) == {("a", 0.7), ("a", 1.0), ("b", 0.0), ("b", 0.5), ("c", 0.7), ("c", 1.0)}
    assert min(used.values()) > 5
    # One call for each model and temperature, each with a seed of its own.
    assert len(calls) == 6 and len({seed for *_, seed, _ in calls}) == 6 and sum(n for *_, n in calls) == 120


def test_the_ways_follow_from_prompt_and_seed():
    variants = [model("a"), model("b")]
    whole, _ = respond_twice(PROMPTS, variants, seed=3)
    part, _ = respond_twice([*PROMPTS[20:][::-1], PROMPTS[30]], variants, seed=3)
    assert part == whole[20:][::-1]
    assert respond_twice(PROMPTS, variants, seed=4)[0] != whole


def test_one_model_responds_at_two_temperatures():
    found, _ = respond_twice(PROMPTS, [model("a", temperatures=(0.2, 0.7, 1.0))])
    assert all(one[1] != other[1] for one, other in (candidates.origins for candidates in found))


def test_equal_and_empty_responses_are_asked_again_and_then_counted():
    asked = Counter()

    def sample(prompts, temperature, seed):
        for prompt in prompts:
            asked[prompt] += 1
        replies = {PROMPTS[0]: "same" + " " * asked[PROMPTS[0]], PROMPTS[1]: " \n"}
        # The third prompt gets different responses only when it is asked for the second time.
        return [
            replies.get(prompt, "same" if prompt == PROMPTS[2] and asked[prompt] <= 2 else f"{temperature} {seed}")
            for prompt in prompts
        ]

    variants = [Variant("a", sample, (0.5,)), Variant("b", sample, (1.0,))]
    found, tally = respond_twice(PROMPTS[:4], variants, attempts=3)
    assert [candidates.prompt for candidates in found] == PROMPTS[2:4]
    assert tally.counts == {"equal responses": 1, "empty response": 1}
    assert tally.first["empty response"] == "prompt 2: 'question 1'"
    assert [asked[prompt] for prompt in PROMPTS[:4]] == [6, 6, 4, 2]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "two variants of the model, or two temperatures"),
        ([model("a", temperatures=(0.7, 0.7))], "two variants of the model, or two temperatures"),
        ([model("a"), model("a")], "two variants have the same name"),
        ([model("a"), model("b", temperatures=())], "variant 'b' needs temperatures"),
        ([model("a"), model("b", temperatures=(-1.0,))], "variant 'b' needs temperatures"),
        ([model("a"), Variant("b", lambda prompts, temperature, seed: [])], "variant 'b' gave 0 responses to"),
    ],
)
def test_models_that_cannot_respond(variants, message):
    with pytest.raises(UserError, match=message):
        respond_twice(PROMPTS[:8], variants)
