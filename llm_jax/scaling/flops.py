"""What a model costs, from its configuration alone: floating-point operations and parameters.

A multiply-add is two operations. Only matrix products are counted, as in the literature (Kaplan et al. 2020, section
2.1; Hoffmann et al. 2022, appendix F; Chowdhery et al. 2022 (PaLM), appendix B): look-ups, norms, softmax, rotary
positions and the optimiser's update are left out, and so is anything computed twice to save memory.

Legend: D model, N heads, K kv heads, H head dim, F feed-forward, V vocabulary, L layers, T length.
"""

import dataclasses

from llm_jax.config import ModelConfig
from llm_jax.errors import require


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, all layers together."""

    projections: float  # query, key, value and output of the attention
    scores: float  # query times keys, and weights times values
    feed_forward: float
    head: float  # the logits

    @property
    def total(self) -> float:
        """All four together."""
        return self.projections + self.scores + self.feed_forward + self.head


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many parameters a model has. A matrix that is both embedding and head is counted once, as embedding."""

    embedding: int
    head: int
    non_embedding: int  # the layers and the last norm: every weight, norms' scales and biases too

    @property
    def total(self) -> int:
        """What `models.count_parameters` counts."""
        return self.embedding + self.head + self.non_embedding


def count(model: ModelConfig) -> Parameters:
    """Embedding V D, head V D (0 if tied), and L (2 D H (N + K) + 3 D F + 2 D [+ H (N + 2 K) of biases]) + D.

    A reward model's head has D + 1 instead.
    Of the ways to leave embeddings out, this one gives the sizes that Baichuan-2 prints for its sweep (11.51 to
    3019.33 million): norms counted, embedding and head not.
    """
    D, F = model.hidden_size, model.ffn_size
    bias = model.head_dim * (model.num_heads + 2 * model.num_kv_heads) if model.qkv_bias else 0
    layer = _projection_weights(model) + 3 * D * F + 2 * D + bias
    table = model.vocab_size * D
    head = D + 1 if model.output == "reward" else 0 if model.tie_embeddings else table
    return Parameters(embedding=table, head=head, non_embedding=model.num_layers * layer + D)


def forward_flops(model: ModelConfig, length: int, *, causal: bool = True) -> ForwardFlops:
    """FLOPs of the forward pass for one token of a sequence of `length` = T tokens, averaged over the sequence.

    projections = 4 L D H (N + K), scores = 4 N H * (keys that a query sees, summed over the layers),
    feed_forward = 6 L D F (three matrices), head = 2 V D.

    A causal query sees (T + 1) / 2 keys on average, fewer within a window. `causal=False` counts all T keys, as the
    sources do (Kaplan et al. table 1 and PaLM have 2 T D of the products per layer) and as an implementation computes
    that masks a whole score matrix. The sources' embedding product (Hoffmann et al.) is a look-up here: 0.

    Raises `UserError` unless `length` is positive.
    """
    require(length > 0, f"length={length} must be positive to count FLOPs")
    L, D = model.num_layers, model.hidden_size
    windows = model.window_sizes or (0,) * L
    keys = sum(mean_visible_keys(length, window) for window in windows) if causal else L * length
    return ForwardFlops(
        projections=2.0 * L * _projection_weights(model),
        scores=4.0 * model.num_heads * model.head_dim * keys,
        feed_forward=6.0 * L * D * model.ffn_size,
        head=2.0 * model.vocab_size * D,
    )


def training_flops_per_token(model: ModelConfig, length: int) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass.

    For every product y = x w the backward pass has two of the same size, dx = dy w^T and dw = x^T dy (Kaplan et al.
    section 2.1). Of attention, what causality and windows hide is not counted.
    """
    return 3.0 * forward_flops(model, length).total


def training_flops(model: ModelConfig, length: int, tokens: float) -> float:
    """FLOPs of training on `tokens` tokens in sequences of `length`."""
    return training_flops_per_token(model, length) * tokens


def six_n(model: ModelConfig, tokens: float) -> float:
    """The approximation C = 6 N D of training FLOPs, with N the non-embedding parameters (Kaplan et al., eq. 2.2).

    It leaves out the head and the attention's scores: far too low for small models with large vocabularies.
    """
    return 6.0 * count(model).non_embedding * tokens


def mean_visible_keys(length: int, window: int) -> float:
    """How many keys a query sees on average in a causal sequence, itself included; window 0 is unlimited."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _projection_weights(model: ModelConfig) -> int:
    """Weights of a layer's query, key, value and output matrices."""
    return 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
