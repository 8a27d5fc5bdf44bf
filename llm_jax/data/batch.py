"""The batch that every loss function reads: packed token sequences as numpy arrays.

Shapes: B sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Packed sequences; every field has shape [B,T].

    `loss_weights` is 0 where the target is padding or belongs to another document than its token. `segment_ids`
    counts the documents of a sequence from 1, with 0 for padding. `positions` restart at 0 with every document and
    at the beginning of every sequence.
    """

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    loss_weights: np.ndarray  # float32
    segment_ids: np.ndarray  # int32
    positions: np.ndarray  # int32
