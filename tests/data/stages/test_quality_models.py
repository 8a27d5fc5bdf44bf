"""Of what the scales of languages are made."""

import numpy as np
import pyarrow as pa

from llm_jax.data.stages import quality_models


def count_high_bytes(found, parts):
    """Stands in for a language model: one bit for each byte that is not ASCII."""
    high = np.concatenate([[0], np.cumsum(found.data >= 0x80)])
    return high[parts.stops] - high[parts.starts]


def test_garbage_is_of_letters_or_of_characters_as_a_language_is_written():
    sample = pa.table({"language": ["zh", "yue-HK", "en"] * 30, "text": ["a sentence of some length"] * 90})
    scales = quality_models.sentence_scales(count_high_bytes, sample, 10, np.random.default_rng(0))
    assert {language: scale.garbage for language, scale in scales.items()} == {"": 0, "en": 0, "yue-HK": 1, "zh": 1}
    assert {scale.reference for scale in scales.values()} == {0}
