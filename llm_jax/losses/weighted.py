"""Sums kept apart from their weights, so that one division after all accumulation gives an exact mean."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class WeightedSum(NamedTuple):
    """An unreduced sum and the weight to divide it by, both float32 scalars."""

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """The sum over the weight; 0 where the weight is 0."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


class LossOutput(NamedTuple):
    """What every loss function returns: the loss is `total / weight`, summed over all microbatches and devices."""

    total: jax.Array
    weight: jax.Array
    metrics: Mapping[str, WeightedSum]
