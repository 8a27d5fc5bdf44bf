"""Logistic regression on hashed byte n-grams: how it is fitted, calibrated, and judged on texts that it has not seen.

The features of a text are those of `byte_ngrams.linear_rows`, so that one pass over a text gives the scores of two
classifiers. A text's margin is the mean weight of its n-grams times the square root of their number, at most
`EVIDENCE`: longer texts are surer, but pages are no surer than a page. Calibration fits a slope and an intercept for
each group of languages (Platt, 1999).

Legend: N texts, M n-grams of all texts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import optimize, special

from llm_jax.data import ngrams
from llm_jax.data.loops import compiled
from llm_jax.data.stages import byte_ngrams
from llm_jax.data.stages.byte_ngrams import PAD, ROWS

EVIDENCE = 1024  # bytes
BATCH_BYTES = 1 << 16
EPOCHS = 6
RATE = 0.1
DECAY = 1e-5
BINS = 10

Floats = npt.NDArray[np.float32]


class Examples(NamedTuple):
    """Labelled texts."""

    texts: Sequence[str]
    groups_N: npt.NDArray[np.uint32]  # of their languages
    labels_N: npt.NDArray[np.bool_]

    def where(self, chosen_N: npt.NDArray[np.bool_]) -> "Examples":
        """Some of them."""
        texts = [text for text, is_chosen in zip(self.texts, chosen_N, strict=True) if is_chosen]
        return Examples(texts, self.groups_N[chosen_N], self.labels_N[chosen_N])


def fit(examples: Examples, *, epochs: int = EPOCHS) -> Floats:
    """The n-grams' weights, float32 [ROWS], after `epochs` passes of Adagrad (Duchi et al., 2011) in the order given.

    The loss is the mean cross-entropy over a batch of texts of some `BATCH_BYTES`, and a small decay of the weights.
    """
    # The gradient of a text longer than half of a batch is that of its beginning.
    texts = [text.encode()[: BATCH_BYTES // 2].decode(errors="ignore") for text in examples.texts]
    found = byte_ngrams.buffer(pa.array(texts, pa.large_string()))
    sizes_N = found.stops - found.starts
    rows_M = byte_ngrams.linear_rows(found.folded, found.starts, found.stops, examples.groups_N)
    edges = np.append(0, np.cumsum(len(byte_ngrams.LINEAR_ORDERS) * sizes_N))
    batches = list(ngrams.runs(np.append(0, np.cumsum(sizes_N + len(PAD))), BATCH_BYTES - len(PAD)))
    weights_R, squares_R = np.zeros(ROWS, np.float32), np.full(ROWS, 1e-8, np.float32)
    for _ in range(epochs):
        for first, last in batches:
            scale_N, labels_N = scale(sizes_N[first:last]), examples.labels_N[first:last]
            _update(weights_R, squares_R, gradient(weights_R, rows_M, edges[first : last + 1], scale_N, labels_N))
    return weights_R


@compiled
def gradient(
    weights_R: Floats,
    rows_M: npt.NDArray[np.uint32],
    edges: npt.NDArray[np.int64],
    scale_N: Floats,
    labels_N: npt.NDArray[np.bool_],
) -> Floats:
    """Of the loss of some texts, float32 [ROWS]; text i has the n-grams `rows_M[edges[i]:edges[i + 1]]`."""
    gradient_R = np.float32(DECAY) * weights_R
    for i in range(len(labels_N)):
        margin = 0.0
        for m in range(edges[i], edges[i + 1]):
            margin += weights_R[rows_M[m]]
        probability = 1 / (1 + np.exp(-margin * scale_N[i]))
        error = np.float32((probability - labels_N[i]) * scale_N[i] / len(labels_N))
        for m in range(edges[i], edges[i + 1]):
            gradient_R[rows_M[m]] += error
    return gradient_R


@compiled
def _update(weights_R: Floats, squares_R: Floats, gradient_R: Floats) -> None:
    """Adagrad's step, in place."""
    for row in range(len(weights_R)):
        squares_R[row] += gradient_R[row] * gradient_R[row]
        weights_R[row] -= np.float32(RATE) * gradient_R[row] / np.sqrt(squares_R[row])


def scale(sizes_N: npt.NDArray[np.int64]) -> Floats:
    """What the sum of a text's weights is multiplied by."""
    sizes_N = np.maximum(sizes_N, 1)
    return (np.sqrt(np.minimum(sizes_N, EVIDENCE)) / sizes_N).astype(np.float32)


def margins(weights_R: Floats, examples: Examples) -> Floats:
    """The margin of each text, float32 [N]."""
    found = byte_ngrams.buffer(pa.array(examples.texts, pa.large_string()))
    parts = byte_ngrams.whole(found)
    sums_2N = byte_ngrams.weights(found, parts, examples.groups_N, np.stack([weights_R, weights_R], axis=1))
    return sums_2N[0] * scale(found.stops - found.starts)


def platt(features_NF: npt.NDArray[np.float64], labels_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Slopes, then the intercept, of the logistic regression of labels on a few features, float64 [F + 1].

    A little decay keeps the slopes finite where the features separate the labels.
    """
    design = np.column_stack([features_NF, np.ones(len(labels_N))])

    def loss(slopes: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        logits = design @ slopes
        value = np.mean(np.logaddexp(0, logits) - labels_N * logits) + 1e-4 * slopes @ slopes
        return float(value), design.T @ (special.expit(logits) - labels_N) / len(labels_N) + 2e-4 * slopes

    return optimize.minimize(loss, np.zeros(design.shape[1]), jac=True).x


def judgement(probabilities_N: npt.NDArray, labels_N: npt.NDArray[np.bool_], threshold: float) -> dict[str, Any]:
    """What a report says of probabilities for labelled texts.

    Precision and recall at the threshold, the area under the ROC curve (ties count half), and the reliability: for
    each tenth of the scale that has texts their number, mean probability and share of positives.
    """
    found = probabilities_N >= threshold
    hits = int(np.sum(found & labels_N))
    bin_N = np.minimum((probabilities_N * BINS).astype(int), BINS - 1)
    reliability = [
        {
            "texts": int(np.sum(bin_N == i)),
            "probability": float(np.mean(probabilities_N[bin_N == i])),
            "positive": float(np.mean(labels_N[bin_N == i])),
        }
        for i in np.unique(bin_N)
    ]
    return {
        "texts": len(labels_N),
        "positive": int(np.sum(labels_N)),
        "threshold": threshold,
        "precision": hits / max(int(np.sum(found)), 1),
        "recall": hits / max(int(np.sum(labels_N)), 1),
        "area_under_curve": area_under_curve(probabilities_N, labels_N),
        "reliability": reliability,
    }


def area_under_curve(scores_N: npt.NDArray, labels_N: npt.NDArray[np.bool_]) -> float:
    """How often a positive text has a higher score than a negative one; ties count half, NaN without either."""
    positive, negative = np.sort(scores_N[labels_N]), scores_N[~labels_N]
    if not len(positive) or not len(negative):
        return float("nan")
    above = len(positive) - np.searchsorted(positive, negative, side="right")
    ties = np.searchsorted(positive, negative, side="right") - np.searchsorted(positive, negative, side="left")
    return float(np.mean(above + ties / 2) / len(positive))
