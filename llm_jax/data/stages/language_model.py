"""py3langid's classifier (Lui and Baldwin, 2012; py3langid's own model) applied to many texts at once.

Its model is an automaton over bytes whose states emit features, and naive Bayes over log(1 + count) of these. A
compiled loop takes every text through it, with the same answers.
"""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from llm_jax.data.loops import compiled

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Model(NamedTuple):
    """The automaton and the tables of naive Bayes."""

    next_state: npt.NDArray[np.uint32]  # [rows x 256]
    row: Integers  # [states] where a state's row begins in next_state
    feature: npt.NDArray[np.int32]  # [states] that a state emits, -1 = none
    weights: Floats  # [features, classes]
    prior: Floats  # [classes]
    languages: tuple[str, ...]  # [languages], each of one or more classes
    language: tuple[int, ...]  # [classes] the place of a class's language among them


@functools.cache
def load() -> Model:
    """py3langid's own model, a second the first time."""
    loaded = LanguageIdentifier.from_model_file(MODEL_FILE)
    languages = tuple(loaded.labels)
    return Model(
        np.asarray(loaded.tk_nextmove, np.uint32),
        np.asarray(loaded.tk_row, np.int64) << 8,
        np.asarray(loaded.tk_output, np.int32),
        np.asarray(loaded.nb_ptc, np.float32),
        np.asarray(loaded.nb_pc, np.float32),
        languages,
        tuple(languages.index(label) for label in loaded.nb_classes),
    )


def probabilities(data_NT: Bytes, lengths: Integers) -> Floats:
    """The probability of every language [N, languages] for N texts, the first `lengths` bytes of each row of data_NT.

    As in py3langid, a text in capitals is read in lower case (of ASCII letters), and one without any feature has all
    languages alike. py3langid composes the characters of a text first; nearly all text is composed already.
    """
    model = load()
    features_NT = _features(data_NT, lengths, model.next_state, model.row, model.feature)
    features_NT.sort(axis=1)
    logarithms = np.log1p(np.arange(features_NT.shape[1] + 1, dtype=np.float32))
    scores = _scores(features_NT, logarithms, model.weights)
    scores[features_NT[:, -1] >= 0] += model.prior
    scores /= np.sqrt(np.maximum(lengths, 1))[:, None]
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True), dtype=np.float32)
    exponentials /= exponentials.sum(axis=1, keepdims=True)
    chances = np.zeros((len(scores), len(model.languages)), np.float32)
    for kind, language in enumerate(model.language):  # a product of matrices would wake BLAS's threads
        chances[:, language] += exponentials[:, kind]
    return chances


@compiled
def _features(
    data_NT: Bytes,
    lengths: Integers,
    next_state: npt.NDArray[np.uint32],
    row: Integers,
    feature: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """The feature that every text has after each of its bytes [N, T]; -1 = none."""
    features_NT = np.full(data_NT.shape, -1, np.int32)
    for text in range(len(data_NT)):
        data = data_NT[text, : lengths[text]]
        lowered = _has_only_capitals(data)
        state = np.uint32(0)
        for place in range(len(data)):
            lower = 32 if lowered and 65 <= data[place] <= 90 else 0
            state = next_state[row[state] + data[place] + lower]
            features_NT[text, place] = feature[state]
    return features_NT


@compiled
def _scores(features_NT: npt.NDArray[np.int32], logarithms: Floats, weights: Floats) -> Floats:
    """The sum of log(1 + count) times the weight over the features of every text, which are sorted [N, classes]."""
    scores = np.zeros((len(features_NT), weights.shape[1]), np.float32)
    for features, score in zip(features_NT, scores):
        count = 0
        for place in range(np.searchsorted(features, 0), len(features)):
            count += 1
            if place + 1 == len(features) or features[place + 1] != features[place]:
                weight, factor = weights[features[place]], logarithms[count]
                for kind in range(len(score)):
                    score[kind] += factor * weight[kind]
                count = 0
    return scores


@compiled
def _has_only_capitals(part: Bytes) -> bool:
    """Whether a text has ASCII letters, and all of them are capitals."""
    capitals = False
    for byte in part:
        if 97 <= byte <= 122:
            return False
        capitals |= 65 <= byte <= 90
    return capitals
