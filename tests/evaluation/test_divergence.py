"""Divergence against sums over the vocabulary, written out in float64."""

import math

import numpy as np
import pytest

from llm_jax.evaluation.divergence import divergence


def test_against_the_definition():
    generator = np.random.default_rng(0)
    logits_TV, reference_TV = generator.normal(size=(2, 6, 5))
    reference_TV[:3] = logits_TV[:3] + 0.01 * generator.normal(size=(3, 5))
    targets_T = generator.integers(0, 5, 6)
    nats = reference_nats = kl = same = 0.0
    for logits_V, reference_V, target in zip(logits_TV, reference_TV, targets_T):
        p = [math.exp(x) / sum(math.exp(y) for y in reference_V) for x in reference_V]
        q = [math.exp(x) / sum(math.exp(y) for y in logits_V) for x in logits_V]
        nats, reference_nats = nats - math.log(q[target]) / 6, reference_nats - math.log(p[target]) / 6
        kl += sum(a * math.log(a / b) for a, b in zip(p, q)) / 6
        same += (p.index(max(p)) == q.index(max(q))) / 6
    result = divergence(*(x.astype(np.float32) for x in (logits_TV, reference_TV)), targets_T)
    assert [float(x) for x in result] == pytest.approx([nats, reference_nats, kl, same], rel=1e-5)
    assert 0.5 <= same < 1 and kl > 0.01
