"""Referees of texts that no policy is paid by: a lexicon of words that people rated, and a plain regression on ratings.

Both are rewards, and judge what a prompt and its response are together.

N texts, H buckets of features.
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import lsqr

from llm_jax.alignment import ratings
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.rewards import Prompt, Response
from llm_jax.data.packages import members
from llm_jax.errors import require

LEXICON = "vaderSentiment/vader_lexicon.txt"
HALFWAY = 15.0  # of the sum's square, where the score is 0.7 (Hutto and Gilbert's published code)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
BUCKETS = 2**18
PENALTY = 0.5  # of the squared weights


def language_of(text: str) -> str:
    """ "zh" for a text with a Chinese character in it, else "en"."""
    return "zh" if CHINESE.search(text) else "en"


def whole(prompt: Prompt, response: Response) -> str:
    """A prompt and its response as one text."""
    return "".join([*(message.content for message in prompt), response.text])


class Lexicon(NamedTuple):
    """What English words say, from -4 to 4, added up: s / sqrt(s^2 + 15), 0 where no word is known.

    The words are those of VADER (Hutto and Gilbert, 2014); its rules for negations, boosters and capitals are not here.
    """

    valences: Mapping[str, float]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        """The score of each text, float32 [B], in (-1, 1)."""
        texts = (whole(prompt, response) for prompt, response in zip(prompts, responses, strict=True))
        return np.array([self.score(text) for text in texts], np.float32)

    def score(self, text: str) -> float:
        """Of one text."""
        total = sum(self.valences.get(word, 0.0) for word in WORD.findall(text.lower()))
        return total / math.sqrt(total**2 + HALFWAY)


def lexicon(cache: str = "") -> Lexicon:
    """VADER's, out of its package, which is downloaded if need be; `cache` as for `ratings.fetch`."""
    found = {}
    for _, content in members(ratings.fetch(ratings.VADER, cache), LEXICON):
        for line in content.decode("utf-8").splitlines():
            word, _, rest = line.partition("\t")
            if WORD.fullmatch(word):
                found[word] = float(rest.partition("\t")[0])
    require(bool(found), f"{ratings.VADER.requirement} has no {LEXICON}")
    return Lexicon(found)


class Regressor(NamedTuple):
    """People's ratings as a linear function of hashed words and pairs of words (Chinese: 1 to 3 characters).

    Of each language on its own: in standard deviations of the ratings that it was fitted to, from their mean.
    """

    weights: Mapping[str, np.ndarray]  # of each language, [H]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        """The predicted rating of each text, float32 [B]; 0 in a language that it was not fitted to."""
        return self.score([whole(*pair) for pair in zip(prompts, responses, strict=True)])

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Of texts alone."""
        features, languages = features_of(texts), np.array([language_of(text) for text in texts])
        scores_N = np.zeros(len(texts), np.float32)
        for language, weights_H in self.weights.items():
            scores_N[languages == language] = (features @ weights_H)[languages == language]
        return scores_N


def fit(rated: Iterable[RatedText]) -> Regressor:
    """Ridge regression on the texts of each language. Raises `UserError` where all ratings of one are the same."""
    by_language: dict[str, list[RatedText]] = {}
    for text in rated:
        by_language.setdefault(language_of(text.text), []).append(text)
    weights = {}
    for language, texts in by_language.items():
        means_N = np.array([text.mean for text in texts])
        require(np.ptp(means_N) > 0, f"all {len(texts)} texts in {language!r} have the same rating: nothing to fit")
        targets_N = (means_N - means_N.mean()) / means_N.std()
        weights[language] = lsqr(features_of([text.text for text in texts]), targets_N, damp=math.sqrt(PENALTY))[0]
    return Regressor(weights)


def features_of(texts: Sequence[str]) -> sparse.csr_array:
    """Which n-grams a text has, each text's of length 1: float64 [N,H]."""
    columns, starts, values = [], [0], []
    for text in texts:
        found = sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in _ngrams(text.lower())})
        columns += found
        values += [1 / math.sqrt(max(1, len(found)))] * len(found)
        starts.append(len(columns))
    return sparse.csr_array((values, columns, starts), shape=(len(texts), BUCKETS), dtype=np.float64)


def _ngrams(text: str) -> list[str]:
    if language_of(text) == "zh":
        joined = "".join(text.split())
        return [joined[i : i + n] for n in (1, 2, 3) for i in range(len(joined) - n + 1)]
    words = WORD.findall(text)
    return words + [" ".join(pair) for pair in itertools.pairwise(words)]
