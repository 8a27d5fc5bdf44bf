"""Counted FLOPs against XLA's count, against the products in the traced program, and against the papers' tables."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import models
from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.models import presets
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.scaling import flops
from llm_jax.training import language_model, state, step

BATCH, LENGTH = 4, 128
TOKENS = BATCH * LENGTH
BASE = ModelConfig(
    vocab_size=1536,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=704,
    max_length=LENGTH,
    attention="reference",  # computes every score and masks some
    scan_layers=False,  # XLA counts a loop's body once
)
FAMILIES = {
    "plain": BASE,
    "grouped_queries": dataclasses.replace(BASE, num_heads=8, num_kv_heads=2),
    "narrow_heads": dataclasses.replace(BASE, head_dim=32),
    "tied": dataclasses.replace(BASE, tie_embeddings=True),
    "windows": dataclasses.replace(BASE, window_sizes=(32, 0)),
    "norm_head": dataclasses.replace(BASE, norm_head=True),
    "alibi": dataclasses.replace(BASE, position="alibi"),
    "biases": dataclasses.replace(BASE, qkv_bias=True),
}
families = pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
# Millions of non-embedding parameters in Baichuan-2's scaling-law study.
BAICHUAN2_SWEEP = {
    "11m": 11.51,
    "51m": 51.56,
    "108m": 108.01,
    "307m": 307.60,
    "835m": 835.00,
    "1565m": 1565.60,
    "3019m": 3019.33,
}


def lowered_forward(model):
    def run(params, tokens_BT):
        return models.logits(params, model, tokens_BT)

    return jax.jit(run).lower(models.abstract(model), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))


def training_step(model):
    """The jitted step that pre-training takes, and abstract arguments for it."""
    config = OptimizerConfig(schedule="constant", warmup_steps=0)
    optimizer = adamw.build(config, adamw.decay_mask)
    loss_fn = language_model.loss_function(model, LossConfig(chunk_size=LENGTH))  # one chunk: a loop of one
    update = jax.jit(step.update_function(loss_fn, optimizer))
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), ids, ids)
    numbers = step.seed_number(0), schedules.learning_rate(config, 10)
    return update, (state.abstract_state(model, optimizer, mesh), batch, *numbers)


def sub_programs(equation) -> Iterator:
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if hasattr(item, "jaxpr") or hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item)


def product_flops(program) -> float:
    """Operations of every dot_general of a traced program; a loop's body as often as it runs."""
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(product_flops(sub) for sub in sub_programs(equation))
    return total


@families
def test_the_forward_pass_is_what_xla_counts(model):
    counted = lowered_forward(model).compile().cost_analysis()["flops"]
    assert flops.forward_flops(model, LENGTH, causal=False).total * TOKENS == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", ("grouped_queries", "windows", "norm_head"))  # compiling takes seconds
def test_the_training_step_is_what_xla_counts(name):
    model = FAMILIES[name]
    update, arguments = training_step(model)
    counted = update.lower(*arguments).compile().cost_analysis()["flops"]
    wanted = 3 * flops.forward_flops(model, LENGTH, causal=False).total * TOKENS
    assert wanted == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("scanned", (False, True))
@families
def test_products_of_the_traced_step_are_counted_exactly(model, scanned):
    update, arguments = training_step(dataclasses.replace(model, scan_layers=scanned))
    counted = product_flops(jax.make_jaxpr(update)(*arguments).jaxpr)
    assert counted == 3 * flops.forward_flops(model, LENGTH, causal=False).total * TOKENS


def test_each_part_is_the_products_of_that_part():
    L, D, F, V = 3, 20, 28, 40
    model = ModelConfig(
        vocab_size=V, hidden_size=D, num_layers=L, num_heads=6, num_kv_heads=2, head_dim=4, ffn_size=F, max_length=8
    )
    parts = flops.forward_flops(model, 8, causal=False)
    query_and_output, key_and_value = 2 * D * 24 * 2, 2 * D * 8 * 2
    assert parts.projections == L * (query_and_output + key_and_value)
    assert parts.scores == L * 2 * (2 * 8 * 24)
    assert parts.feed_forward == L * 3 * 2 * D * F
    assert parts.head == 2 * D * V
    assert parts.total == parts.projections + parts.scores + parts.feed_forward + parts.head


@given(length=st.integers(1, 40), window=st.integers(0, 50))
def test_visible_keys_by_counting_them(length, window):
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & ((distance < window) | (window == 0))
    assert flops.mean_visible_keys(length, window) == pytest.approx(visible.sum() / length)


def test_causal_scores_are_the_visible_pairs_layer_by_layer():
    model = FAMILIES["windows"]
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    pairs = sum(int(((distance >= 0) & (distance < window)).sum()) for window in (32, LENGTH))
    assert flops.forward_flops(model, LENGTH).scores * LENGTH == pytest.approx(2 * 2 * 256 * pairs)
    full = flops.forward_flops(model, LENGTH, causal=False)
    assert dataclasses.replace(flops.forward_flops(model, LENGTH), scores=full.scores) == full


def test_training_flops_are_three_forward_passes_of_all_tokens():
    per_token = flops.training_flops_per_token(BASE, LENGTH)
    assert per_token == 3 * flops.forward_flops(BASE, LENGTH).total
    assert flops.training_flops(BASE, LENGTH, 1e9) == pytest.approx(1e9 * per_token)


@pytest.mark.parametrize("model", [*FAMILIES.values(), *presets.PRESETS.values()], ids=[*FAMILIES, *presets.PRESETS])
def test_parameters_are_those_of_the_model(model):
    counted = flops.count(model)
    assert counted.total == models.count_parameters(model)
    shapes = models.abstract(model)
    assert counted.embedding == shapes["embedding"]["embedding"].size
    assert counted.head == ("head" in shapes and shapes["head"]["kernel"].size)


@pytest.mark.parametrize(("size", "millions"), BAICHUAN2_SWEEP.items())
def test_non_embedding_parameters_are_those_that_baichuan2_prints(size, millions):
    assert flops.count(presets.get(f"baichuan2_sweep_{size}")).non_embedding / 1e6 == pytest.approx(millions, abs=0.005)


def test_six_n_is_near_for_a_large_model_and_far_too_low_for_a_small_one():
    large, small = presets.get("llama2_70b"), presets.get("baichuan2_sweep_11m")
    assert flops.six_n(large, 2e12) == pytest.approx(flops.training_flops(large, 4096, 2e12), rel=0.05)
    assert flops.six_n(small, 1e12) < 0.2 * flops.training_flops(small, 4096, 1e12)
    assert flops.six_n(small, 1e12) == 6 * 1e12 * flops.count(small).non_embedding


def test_a_length_of_zero_is_refused():
    with pytest.raises(UserError, match="length=0 must be positive"):
        flops.training_flops(BASE, 0, 100)
