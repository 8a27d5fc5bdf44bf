"""Unpaid referees: the lexicon out of a package made here, and the regression against the normal equations."""

import itertools
import math

import numpy as np
import pytest

from llm_jax.alignment import ratings, referees
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.referees import Lexicon
from llm_jax.alignment.rewards import Response
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message
from tests.alignment.test_ratings import archive


def asked(start):
    return (Message("user", start),)


def rated(text, mean, language="en"):
    return RatedText(text, mean, (), "movies", language, "")


def test_the_lexicon_of_the_package(tmp_path, monkeypatch):
    lines = "good\t1.9\t0.9\t[2, 1]\nbad\t-2.5\t0.6\t[-3]\n:)\t2.0\t1.1\t[2]\nisn't\t-0.5\t0\t[0]\n"
    path = tmp_path / "vader.tar.gz"
    path.write_bytes(archive({"vaderSentiment/vader_lexicon.txt": lines}, "vader-1.0/"))
    monkeypatch.setattr(ratings, "fetch", lambda package, cache: path)
    assert referees.lexicon().valences == {"good": 1.9, "bad": -2.5, "isn't": -0.5}
    path.write_bytes(archive({"else.txt": lines}, "vader-1.0/"))
    with pytest.raises(UserError, match="has no vaderSentiment"):
        referees.lexicon()


def test_the_lexicon_adds_up_the_words_of_prompt_and_response():
    lexicon = Lexicon({"good": 1.5, "bad": -2.5})
    found = lexicon([asked("Good"), asked("a goo"), ()], [Response(", good. Bad"), Response("d one"), Response("不好")])
    expected = [0.5 / math.sqrt(0.25 + 15), 1.5 / math.sqrt(2.25 + 15), 0]
    assert found.dtype == np.float32 and found == pytest.approx(expected, abs=1e-6)


def test_the_regression_is_the_ridge_solution():
    texts = ["good good film", "bad film", "a good one", "so bad a one", "film"]
    means = np.array([2.0, -1.0, 3.0, -2.0, 0.5])
    found = referees.fit([rated(*pair) for pair in zip(texts, means)]).score(texts)
    grams = [set(words) | set(itertools.pairwise(words)) for words in map(str.split, texts)]
    known = sorted(set.union(*grams), key=str)
    features = np.array([[(gram in own) / math.sqrt(len(own)) for gram in known] for own in grams])
    kernel = features @ features.T  # the same solution, by the texts' products
    targets = (means - means.mean()) / means.std()
    expected = kernel @ np.linalg.solve(kernel + referees.PENALTY * np.eye(len(texts)), targets)
    assert found == pytest.approx(expected, abs=1e-4)


def test_each_language_is_on_its_own():
    chinese = [rated("很好", 1, "zh"), rated("不好", -1, "zh")]
    both = referees.fit([*chinese, rated("good film", 4), rated("bad film", 0)])
    assert both.score(["很好", "不好"]) == pytest.approx(referees.fit(chinese).score(["很好", "不好"]), abs=1e-6)
    assert both([asked("很")], [Response("好")])[0] > 0.3 and both([asked("bad")], [Response(" film")])[0] < -0.3
    assert referees.fit(chinese).score(["good film", "10/10"]).tolist() == [0, 0]
    with pytest.raises(UserError, match="all 2 texts in 'en' have the same rating"):
        referees.fit([rated("one", 1), rated("two", 1)])
