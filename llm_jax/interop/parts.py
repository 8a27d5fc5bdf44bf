"""A parameter's layer as rows of a tensor in torch's layout: what `placement` reads of most checkpoints.

D model, N heads (or kv heads), H head dim.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.interop import families
from llm_jax.interop.placement import Region


class Rows(Protocol):
    """A tensor that is read in blocks of rows, such as `storage.StoredTensor`."""

    @property
    def name(self) -> str:
        """What its file calls it."""

    def chunks(self, unit: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of a multiple of `unit` rows, each with the index of its first row."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer of a parameter, or all of one that is not stacked: a `placement.Source`.

    Attributes:
      tensor: the rows that hold it, and nothing else.
      parameter: its path, one of `families.LAYOUTS`.
      config: the model, with the dtype that the values are cast to.
      interleaved: whether the features of each head come in rotary pairs and are to be put in halves.
      bad: names of tensors with values that are not finite are added to this.
    """

    tensor: Rows
    parameter: str
    config: ModelConfig
    interleaved: bool
    bad: dict[str, None]

    def blocks(self) -> Iterator[tuple[Region, np.ndarray]]:
        """See `placement.Source`."""
        ours, torchs = families.LAYOUTS[self.parameter]
        groups = families.torch_axes(self.parameter, self.config)
        order = [torchs.replace(" ", "").index(axis) for axis in ours]
        inner = groups[0][1:] + [size for group in groups[1:] for size in group]
        unit = math.prod(groups[0][1:])
        for start, rows in self.tensor.chunks(unit):
            with np.errstate(over="ignore"):  # what becomes infinite is reported by name
                block = rows.reshape(len(rows) // unit, *inner).astype(self.config.param_dtype, copy=False)
            if not _all_finite(block):
                self.bad[self.tensor.name] = None
            if self.interleaved:
                block = _half_split(block)
            filled = [slice(start // unit, start // unit + len(block)), *(slice(0, size) for size in inner)]
            yield tuple(filled[axis] for axis in order), block.transpose(order)


def _half_split(block_NHD: np.ndarray) -> np.ndarray:
    """Features of each head from the order of pairs, 0 1 2 3 ..., to that of halves, 0 2 ... 1 3 ..."""
    return np.concatenate([block_NHD[:, 0::2], block_NHD[:, 1::2]], axis=1)


def _all_finite(block: np.ndarray) -> bool:
    """Whether it holds neither NaN nor infinity, from the exponents' bits: four times as fast as `np.isfinite`."""
    exponent = np.array(np.inf, block.dtype).view(f"u{block.itemsize}")
    return bool((block.view(exponent.dtype) & exponent).max(initial=0) < exponent)
