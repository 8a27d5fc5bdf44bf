"""Perplexity of the same long texts read in windows of several lengths: what a model loses past its trained length.

A text of N tokens is cut into N / L windows for every length L, so each length predicts exactly the same N tokens, and
only the context differs: the form of Qwen's Table 3.

S seeds, D documents, N predicted tokens of a document, W windows, L length of a window.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.evaluation.perplexity import token_nats

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "plain RoPE": (),
    "+ dynamic NTK": ("dynamic_ntk",),
    "+ log-n": ("dynamic_ntk", "log_n"),
    "+ window": ("dynamic_ntk", "log_n", "window_sizes"),
    "window alone": ("window_sizes",),  # not in Qwen's table: what of the row above comes from the windows
}
ALIBI = "ALiBi"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over documents and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values_D: np.ndarray) -> "Estimate":
        """Of equally long documents; NaN is the error of a single one."""
        count = len(values_D)
        error = float(np.std(values_D, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(np.mean(values_D)), error)

    def exponential(self) -> "Estimate":
        """From nats to perplexity: the error in first order."""
        return Estimate(math.exp(self.mean), math.exp(self.mean) * self.error)


def layer_windows(num_layers: int, shortest: int, longest: int) -> tuple[int, ...]:
    """A window for each layer, growing by a constant factor from the first layer to the last.

    Qwen gives lower layers shorter windows (section 2.3) and publishes no sizes: these are ours.
    """
    require(0 < shortest <= longest, f"windows from {shortest} to {longest}: the first must be positive and not longer")
    steps = max(num_layers - 1, 1)
    return tuple(round(shortest * (longest / shortest) ** (layer / steps)) for layer in range(num_layers))


def variants(config: ModelConfig, windows: tuple[int, ...]) -> dict[str, ModelConfig]:
    """The rows of the table that a trained model can give, whatever extensions its own config turns on."""
    config = dataclasses.replace(config, dynamic_ntk=False, log_n=False, window_sizes=())  # the checkpoint may say so
    if config.position == "alibi":
        return {ALIBI: config}
    values = {"dynamic_ntk": True, "log_n": True, "window_sizes": windows}
    changes = {name: {field: values[field] for field in fields} for name, fields in EXTENSIONS.items()}
    return {name: dataclasses.replace(config, **change) for name, change in changes.items()}  # type: ignore[arg-type]


def streams(documents: Sequence[Sequence[int]], tokens: int, limit: int) -> np.ndarray:
    """The first `tokens` + 1 ids of the first `limit` documents that have as many, int32 [D, N+1].

    Raises `UserError` if no document is that long.
    """
    chosen = [document[: tokens + 1] for document in documents if len(document) > tokens][:limit]
    longest = max(map(len, documents), default=0)
    require(
        bool(chosen),
        f"none of {len(documents)} held-out documents has the {tokens + 1} tokens that the longest windows need (the "
        f"longest has {longest}): ask for smaller multiples or another corpus",
    )
    return np.asarray(chosen, np.int32)


def measure(
    params: Any,
    config: ModelConfig,
    streams_DN: np.ndarray,
    length: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Nats of every predicted token, float32 [D, N], read in windows of `length`, which must divide N.

    Batches hold about `batch_tokens`; `advance` is told how many tokens each one measured.
    """
    tokens_WL, targets_WL = streams_DN[:, :-1].reshape(-1, length), streams_DN[:, 1:].reshape(-1, length)
    rows = max(1, batch_tokens // length)
    parts = []
    for start in range(0, len(tokens_WL), rows):
        batch = [_rows(array, start, rows) for array in (tokens_WL, targets_WL)]
        real = min(rows, len(tokens_WL) - start)
        parts.append(np.asarray(token_nats(params, config, *batch))[:real])
        advance(real * length)
    return np.concatenate(parts).reshape(len(streams_DN), -1)


def _rows(array_WL: np.ndarray, start: int, rows: int) -> jnp.ndarray:
    """Rows [start, start + rows), zeros beyond the last: every batch has one shape."""
    part = array_WL[start : start + rows]
    return jnp.asarray(np.pad(part, ((0, rows - len(part)), (0, 0))))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The perplexity of one row at one length."""

    perplexity: Estimate  # over documents, each averaged over the seeds
    by_seed: tuple[float, ...]
    change: Estimate | None  # relative to the row above, paired by document, where one extension is added to it


Nats = Mapping[str, Mapping[int, np.ndarray]]  # row -> length -> nats of every predicted token, [seeds, D, N]
Report = dict[str, dict[int, Cell]]


def summarise(nats: Nats) -> Report:
    """Perplexities with their standard errors, and what each extension changes on top of those before it."""
    report: Report = {name: {} for name in nats}
    above: Mapping[int, np.ndarray] | None = None
    for name, row in nats.items():
        for length, nats_SDN in row.items():
            perplexity = Estimate.of(nats_SDN.mean(axis=(0, 2))).exponential()
            by_seed = tuple(float(value) for value in np.exp(nats_SDN.mean(axis=(1, 2))))
            change = _change(above[length], nats_SDN) if above and name.startswith("+") else None
            report[name][length] = Cell(perplexity, by_seed, change)
        above = row
    return report


def _change(before_SDN: np.ndarray, after_SDN: np.ndarray) -> Estimate:
    """The relative change of perplexity, as a mean over documents."""
    ratio = Estimate.of((after_SDN - before_SDN).mean(axis=(0, 2))).exponential()
    return Estimate(ratio.mean - 1.0, ratio.error)


def by_position(nats: Nats) -> dict[str, list[float]]:
    """Mean nats over seeds and documents by position in the longest window, in stretches of a quarter of the shortest.

    Where that is not a whole number, position by position.
    """
    result = {}
    for name, row in nats.items():
        longest, stretch = max(row), min(row) // 4 if min(row) % 4 == 0 else 1
        result[name] = row[longest].reshape(-1, longest // stretch, stretch).mean(axis=(0, 2)).tolist()
    return result
