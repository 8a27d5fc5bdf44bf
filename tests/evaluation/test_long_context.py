"""Reading the same tokens in windows of several lengths, against a loop over windows; errors and changes by hand."""

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.evaluation import long_context
from llm_jax.evaluation.long_context import Estimate

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=24,
    max_length=4,
    init_std=0.4,
)
STREAMS = np.random.default_rng(0).integers(0, 29, (3, 17)).astype(np.int32)


@pytest.mark.parametrize(("length", "batch_tokens"), [(4, 20), (16, 32), (16, 1)])
def test_every_token_is_measured_once_with_the_context_of_its_window(length, batch_tokens):
    config = long_context.variants(CONFIG, (3, 6))["+ window"]
    params = models.init(CONFIG, jax.random.key(0))
    counts = []
    got = long_context.measure(params, config, STREAMS, length, batch_tokens, counts.append)
    assert got.shape == (3, 16) and sum(counts) == 48
    for row in range(3):
        for start in range(0, 16, length):
            window = STREAMS[row, start : start + length + 1]
            logprobs = jax.nn.log_softmax(models.logits(params, config, window[None, :-1])[0])
            want = -logprobs[np.arange(length), window[1:]]
            np.testing.assert_allclose(got[row, start : start + length], want, atol=1e-5)


def test_the_rows_of_each_kind_of_model():
    rows = long_context.variants(CONFIG, (3, 6))
    switches = {name: (c.dynamic_ntk, c.log_n, c.window_sizes) for name, c in rows.items()}
    assert switches == {
        "plain RoPE": (False, False, ()),
        "+ dynamic NTK": (True, False, ()),
        "+ log-n": (True, True, ()),
        "+ window": (True, True, (3, 6)),
        "window alone": (False, False, (3, 6)),
    }
    alibi = ModelConfig(position="alibi")
    assert long_context.variants(alibi, ()) == {"ALiBi": alibi}


def test_windows_grow_by_a_constant_factor():
    assert long_context.layer_windows(4, 100, 800) == (100, 200, 400, 800)
    assert long_context.layer_windows(3, 5, 5) == (5, 5, 5)
    assert long_context.layer_windows(1, 5, 9) == (5,)
    with pytest.raises(UserError, match="windows from 9 to 5"):
        long_context.layer_windows(2, 9, 5)


def test_only_documents_that_are_long_enough_are_read():
    documents = [list(range(5)), list(range(10, 16)), list(range(20, 30)), list(range(30, 36))]
    np.testing.assert_array_equal(
        long_context.streams(documents, 5, 2), [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
    )
    with pytest.raises(UserError, match=r"none of 4 held-out documents has the 11 tokens .* longest has 10"):
        long_context.streams(documents, 10, 2)


def test_errors_are_over_documents_and_changes_are_paired():
    first = np.log([[[2.0, 2.0], [8.0, 8.0]]])  # one seed, two documents of two tokens
    second = np.log([[[1.0, 4.0], [4.0, 16.0]]])  # the same perplexities, token by token another
    third = second - np.log(2.0)
    alibi = np.log([[[3.0, 3.0], [3.0, 3.0]]])
    rows = {"plain RoPE": first, "+ dynamic NTK": second, "+ log-n": third, "ALiBi": alibi}
    report = long_context.summarise({name: {8: row} for name, row in rows.items()})
    cell = report["plain RoPE"][8]
    assert cell.perplexity.mean == pytest.approx(4.0)
    assert cell.perplexity.error == pytest.approx(4.0 * np.log(2.0))  # nats ln 2 and ln 8: their mean's error is ln 2
    assert cell.change is None and report["ALiBi"][8].change is None
    assert (report["+ dynamic NTK"][8].change.mean, report["+ dynamic NTK"][8].change.error) == pytest.approx((0, 0))
    assert report["+ log-n"][8].change.mean == pytest.approx(-0.5)
    assert report["ALiBi"][8].perplexity.error == pytest.approx(0)


def test_seeds_are_averaged_before_documents_are_compared():
    runs = np.log([[[2.0], [8.0]], [[8.0], [2.0]]])  # two seeds that err on different documents
    cell = long_context.summarise({"plain RoPE": {8: runs}})["plain RoPE"][8]
    assert cell.by_seed == pytest.approx((4.0, 4.0))
    assert (cell.perplexity.mean, cell.perplexity.error) == pytest.approx((4.0, 0.0))


def test_the_curve_over_positions_is_that_of_the_longest_windows():
    nats_SDN = np.arange(32.0).reshape(1, 2, 16)  # two windows of 8 a document
    curve = long_context.by_position({"ALiBi": {4: np.zeros((1, 2, 16)), 8: nats_SDN}})["ALiBi"]
    assert curve == [12.0 + position for position in range(8)]
    (mean,) = long_context.by_position({"ALiBi": {4: nats_SDN}})["ALiBi"][:1]
    assert mean == np.mean([4 * window for window in range(8)])


def test_one_document_has_no_error():
    assert np.isnan(Estimate.of(np.array([1.0])).error)
