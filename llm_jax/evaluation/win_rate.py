"""How often one policy's response to a prompt is better than another's: exactly, over all pairs of their samples.

P prompts, K samples of one policy, J of the other.
"""

import numpy as np

from llm_jax.errors import require


def wins(ours_PK: np.ndarray, theirs_PJ: np.ndarray) -> np.ndarray:
    """The share of the K x J pairs in which ours has the higher value, ties counted half: float64 [P].

    NaN where a prompt is not judged. Raises `UserError` for other prompts than ours.
    """
    return np.asarray(np.heaviside(_gaps(ours_PK, theirs_PJ), 0.5).mean(axis=(1, 2)))


def ties(ours_PK: np.ndarray, theirs_PJ: np.ndarray) -> np.ndarray:
    """The share of the pairs that are equal, float64 [P]; otherwise as `wins`."""
    gaps_PKJ = _gaps(ours_PK, theirs_PJ)
    return np.asarray(np.where(np.isnan(gaps_PKJ), np.nan, gaps_PKJ == 0).mean(axis=(1, 2)))


def _gaps(ours_PK: np.ndarray, theirs_PJ: np.ndarray) -> np.ndarray:
    require(
        len(ours_PK) == len(theirs_PJ), f"win rates: {len(ours_PK)} prompts and {len(theirs_PJ)}: they must be the same"
    )
    return np.asarray(ours_PK, np.float64)[:, :, None] - np.asarray(theirs_PJ, np.float64)[:, None, :]
