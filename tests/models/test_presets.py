"""The presets against the published parameter counts."""

import jax
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import presets

PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "baichuan_7b": 7_000_559_616,
    "baichuan_13b": 13_264_901_120,
    "baichuan2_7b": 7_505_973_248,
    "baichuan2_13b": 13_896_668_160,
    "qwen_1_8b": 1_836_828_672,
    "qwen_7b": 7_721_324_544,
    "qwen_14b": 14_167_290_880,
}
# Baichuan-2's scaling-law models: millions of parameters without embeddings, as printed.
SWEEP = {"11m": 11.51, "51m": 51.56, "108m": 108.01, "307m": 307.60, "835m": 835.00, "1565m": 1565.60, "3019m": 3019.33}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    assert models.count_parameters(presets.get(name)) == PUBLISHED[name]


@pytest.mark.parametrize("size", SWEEP)
def test_sweep_sizes_without_embeddings(size):
    config = presets.get(f"baichuan2_sweep_{size}")
    millions = (models.count_parameters(config) - 2 * config.vocab_size * config.hidden_size) / 1e6
    assert millions == pytest.approx(SWEEP[size], abs=0.006)


def test_counting_allocates_nothing():
    before = len(jax.live_arrays())
    models.count_parameters(presets.get("llama2_70b"))
    assert len(jax.live_arrays()) == before


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'baichuan2_7b'"):
        presets.get("baichuan2-7b")
