"""Logistic regression on hashed byte n-grams: how it is fitted, calibrated, and judged on texts that it has not seen.

The features of a text are those of `byte_ngrams.linear_hashes`, so that one pass over a text gives the scores of two
classifiers. A text's margin is the mean weight of its n-grams times the square root of their number, at most
`EVIDENCE`: longer texts are surer, but pages are no surer than a page. Calibration fits a slope and an intercept for
each group of languages (Platt, 1999).

Legend: N texts, M n-grams of all texts of a batch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import optimize, special

from llm_jax.data.stages import byte_ngrams
from llm_jax.data.stages.byte_ngrams import PAD, ROWS, WIDTH

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
    weights_R = jax.device_put(np.zeros(ROWS, np.float32), byte_ngrams.on_cpu())
    squares_R = jax.device_put(np.full(ROWS, 1e-8, np.float32), byte_ngrams.on_cpu())
    batches = [_batch(examples, start, stop) for start, stop in _spans(examples.texts)]
    for _ in range(epochs):
        for batch in batches:
            weights_R, squares_R = _update(weights_R, squares_R, *batch)
    return np.asarray(weights_R)


def _spans(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Runs of texts that fit into a batch with their pads; a text longer than that is cut in `_batch`."""
    sizes = np.array([min(len(text.encode()), BATCH_BYTES // 2) + len(PAD) for text in texts])
    spans, start, total = [], 0, len(PAD)
    for i, size in enumerate(sizes):
        if total + size > BATCH_BYTES and i > start:
            spans.append((start, i))
            start, total = i, len(PAD)
        total += int(size)
    return [*spans, (start, len(texts))] if texts else []


def _batch(examples: Examples, start: int, stop: int) -> tuple[jax.Array, ...]:
    """The rows of n-grams, the text of each, and of each text its scale, label and weight, in arrays of one size."""
    texts = [text.encode()[: BATCH_BYTES // 2].decode(errors="ignore") for text in examples.texts[start:stop]]
    found = byte_ngrams.buffer(pa.array(texts, pa.large_string()))
    data_B = np.full(BATCH_BYTES + WIDTH, 10, np.uint8)
    text_B = np.full(BATCH_BYTES + WIDTH, TEXTS, np.int32)
    groups_B = np.zeros(BATCH_BYTES + WIDTH, np.uint32)
    data_B[: len(found.data)] = byte_ngrams.FOLD[found.data]
    scale_N, labels_N, weight_N = np.zeros(TEXTS, np.float32), np.zeros(TEXTS, np.float32), np.zeros(TEXTS, np.float32)
    for i, (begin, end) in enumerate(zip(found.starts, found.stops, strict=True)):
        text_B[begin:end] = i
        groups_B[begin:end] = examples.groups_N[start + i]
    count = stop - start
    scale_N[:count] = scale(found.stops - found.starts)
    labels_N[:count], weight_N[:count] = examples.labels_N[start:stop], 1.0
    data_B, groups_B = jax.device_put((data_B, groups_B), byte_ngrams.on_cpu())
    row_M = jnp.concatenate([byte_ngrams.rows(mix) for mix in byte_ngrams.linear_hashes(data_B, groups_B)])
    text_M = np.tile(text_B[WIDTH - 1 :], len(byte_ngrams.LINEAR_ORDERS))
    return row_M, *jax.device_put((text_M, scale_N, labels_N, weight_N), byte_ngrams.on_cpu())


TEXTS = BATCH_BYTES // len(PAD)  # more than a batch can hold


def scale(sizes_N: npt.NDArray[np.int64]) -> Floats:
    """What the sum of a text's weights is multiplied by."""
    sizes_N = np.maximum(sizes_N, 1)
    return (np.sqrt(np.minimum(sizes_N, EVIDENCE)) / sizes_N).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _update(
    weights_R: jax.Array,
    squares_R: jax.Array,
    row_M: jax.Array,
    text_M: jax.Array,
    scale_N: jax.Array,
    labels_N: jax.Array,
    weight_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    sums_N = jax.ops.segment_sum(weights_R[row_M], text_M, TEXTS + 1)[:TEXTS]
    error_N = (jax.nn.sigmoid(sums_N * scale_N) - labels_N) * scale_N * weight_N / jnp.sum(weight_N)
    gradient_R = (DECAY * weights_R).at[row_M].add(jnp.append(error_N, 0.0)[text_M])
    squares_R += gradient_R**2
    return weights_R - RATE * gradient_R / jnp.sqrt(squares_R), squares_R


def margins(weights_R: Floats, examples: Examples) -> Floats:
    """The margin of each text, float32 [N]."""
    found = byte_ngrams.buffer(pa.array(examples.texts, pa.large_string()))
    packed = byte_ngrams.pack(weights_R, np.zeros_like(weights_R))
    nothing = np.zeros((byte_ngrams.ORDER, 1), np.uint32)
    tables = byte_ngrams.place(byte_ngrams.Tables(nothing, np.float32(1), packed))
    whole = byte_ngrams.Sentences(found.starts, found.stops, np.arange(len(found.starts)))
    sums = byte_ngrams.part_sums(byte_ngrams.weights(found, examples.groups_N, tables)[0], whole)
    return sums * scale(found.stops - found.starts)


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
