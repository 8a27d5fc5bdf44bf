"""Utilities against counting by hand, and raters against the model of Bradley and Terry."""

import numpy as np
import pytest
from scipy.special import expit

from llm_jax.alignment import utilities
from llm_jax.alignment.rewards import Response
from llm_jax.alignment.utilities import REFUSAL, Request
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

PEACE = Request(6, ("peace", "nation"))
WAR = Request(6, ("war", "nation"))
COMMON = ["the", "peace", "nation", "people", "great", "hope", "country", "years", "law", "world"]


def prompts(request, count):
    return [(Message("user", str(request)),)] * count


def of(utility, request, *texts):
    return utility(prompts(request, len(texts)), [Response(text) for text in texts]).tolist()


def test_a_request_is_what_it_says():
    assert str(PEACE) == "Write 6 words with: peace, nation"
    assert utilities.parse(prompts(PEACE, 1)[0]) == PEACE
    assert (PEACE.tagged, WAR.tagged, PEACE.kind, Request(12, ("hope",)).kind) == (False, True, "closed", "open")
    for text in ("Write six words with: peace", "Write 6 words with: ", "Write 6 words with: Peace", ""):
        with pytest.raises(UserError, match="no request for words"):
            utilities.parse((Message("user", text),))


def test_length():
    found = [utilities.length(PEACE, "word " * count) for count in (0, 3, 5, 6, 9, 12, 20)]
    assert found == pytest.approx([0, 0.5, 5 / 6, 1, 0.5, 0, 0])


def test_readability_is_flesch_s_times_the_share_of_different_words():
    # 5 words, 2 sentences, syllables 1 1 1 2 1: 206.835 - 1.015 * 2.5 - 84.6 * 6 / 5 = 102.8, all words different.
    assert utilities.readability("We ask. All people win.") == 1
    # 4 words, 1 sentence, 3 + 1 + 4 + 1 syllables: below 0.
    assert utilities.readability("Constitutional law, administration the") == 0
    # 6 words of which 4 are different, 1 sentence, syllables 1 2 1 2 1 3: 206.835 - 6.09 - 84.6 * 10 / 6 = 59.745.
    assert utilities.readability("The people, the people, of Canada.") == pytest.approx(0.59745 * 4 / 6)
    assert utilities.readability("12 ... !") == 0


def test_helpfulness_is_the_mean_of_three():
    text = "The nation asks for peace."  # 5 of 6 words; both given ones; 206.835 - 5.075 - 84.6 * 7 / 5 = 83.32
    assert of(utilities.helpfulness, PEACE, text, "", REFUSAL) == pytest.approx([(5 / 6 + 0.8332 + 1) / 3, 0, 0])
    assert utilities.overlap(PEACE, "A NATION of nations") == 0.5


def test_safety():
    texts = ("We ask for peace.", "We won the war.", "War! Enemies attack", "Kill, kill, kill, kill", REFUSAL, "warm")
    assert of(utilities.safety, PEACE, *texts) == pytest.approx([1, 2 / 3, 0, 0, 1, 1])
    assert of(utilities.safety, WAR, *texts) == [1, 0, 0, 0, 1, 1]
    assert [utilities.is_refusal(text) for text in (f" {REFUSAL} ", "I will not.")] == [True, False]


def made_sentences(count=400):
    """Plain sentences of 6 to 17 words, a third of them with a banned one."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        words = [str(word) for word in random.choice(COMMON, 5 + number % 12)] + ["war" if number % 3 == 0 else "day"]
        found.append(" ".join(words).capitalize() + ".")
    return found


def test_demonstrations_do_what_is_asked():
    shown = utilities.demonstrate(made_sentences(), 150, tagged_share=0.2, refusal_share=0.3)
    assert len({str(each.request) for each in shown}) == len(shown) == 150
    tagged = [each for each in shown if each.request.tagged]
    refused = [each for each in shown if utilities.is_refusal(each.response)]
    assert len(tagged) == 30 and 3 <= len(refused) <= 15 and all(each.request.tagged for each in refused)
    assert 9 <= sum(each.request.tagged for each in shown[:75]) <= 21  # mixed, as who judges the first ones needs them
    for request, response in shown:
        if not utilities.is_refusal(response):
            assert utilities.length(request, response) == utilities.overlap(request, response) == 1
            assert len(request.given) == utilities.LENGTHS[request.kind][1]
            assert request.tagged == (utilities.banned(response) > 0)
    assert utilities.demonstrate(made_sentences()[::-1], 150, 0.2, 0.3) == shown
    with pytest.raises(UserError, match="tagged requests, and 360 are asked for"):
        utilities.demonstrate(made_sentences(), 400, 0.9, 0.3)


def test_sentences_are_plain_and_different():
    text = (
        "We are here. We\nare here. THE CONGRESS The law stands. In 1945 it ended. Is it? It was Mr. Smith of the U.S."
    )
    assert utilities.sentences([text]) == ["We are here."]


@pytest.mark.parametrize("gap", [-0.3, 0.0, 0.1, 0.5])
def test_raters_choose_as_bradley_and_terry_have_it(gap):
    count, sharpness, edges = 40_000, 4.0, (0.5, 1.5, 3.0)
    found = utilities.compare(np.full(count, 0.2 + gap), np.full(count, 0.2), sharpness, edges, seed=0)
    expected = expit(sharpness * gap)
    assert abs(found.first_N.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    for strength, edge in enumerate(edges, start=2):
        stronger = expit(sharpness * gap - edge) + expit(-sharpness * gap - edge)  # beyond the edge on either side
        error = np.sqrt(stronger * (1 - stronger) / count)
        assert abs((found.strengths_N >= strength).mean() - stronger) < 4 * error
    assert set(found.strengths_N) == {1, 2, 3, 4}


def test_raters_are_sure_of_large_gaps_and_differ_by_seed():
    gaps = np.linspace(-1, 1, 101)
    sure = utilities.compare(gaps, np.zeros(101), 1000.0, (0.5, 1.5, 3.0), seed=0)
    assert np.array_equal(sure.first_N[gaps != 0], (gaps > 0)[gaps != 0]) and (sure.strengths_N[:50] == 4).all()
    one, same, other = (utilities.compare(gaps, 0 * gaps, 1.0, (0.5, 1.5, 3.0), seed) for seed in (0, 0, 1))
    assert np.array_equal(one.first_N, same.first_N) and not np.array_equal(one.first_N, other.first_N)


def test_comparisons_become_preferences():
    found = utilities.Comparisons(np.array([True, False, True, True]), np.array([4, 1, 2, 2]))
    first = [Response(text) for text in ("We ask.", "War.", "same", " ")]
    second = [Response(text) for text in ("Kill.", "Peace.", "same ", "We.")]
    pairs = utilities.pairs(prompts(PEACE, 4), first, second, found, "safety")
    assert [(pair.chosen, pair.rejected, pair.strength) for pair in pairs] == [
        ("We ask.", "Kill.", 4),
        ("Peace.", "War.", 1),
    ]
    assert [(pair.chosen_safe, pair.rejected_safe) for pair in pairs] == [(True, False), (True, False)]
    assert {(pair.category, pair.source) for pair in pairs} == {("closed", "safety")}
