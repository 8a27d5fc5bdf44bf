"""The decoder as pure functions over a parameter pytree: the layers of `layers.py`, stacked and scanned.

`params` is a dict with "embedding", "layers" (every leaf with a leading layer axis, or see `for_decoding`),
"final_norm" and "head" (absent when the embeddings are tied) or, in a reward model, "reward_head".

B batch, T length, S cache length, D model, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.config import LayerGroup, ModelConfig
from llm_jax.kernels.mask import AttentionMask
from llm_jax.models import heads, mup, positions
from llm_jax.models.cache import Cache, LayerCache
from llm_jax.models.layers import Block, Embedding, RMSNorm, dropout
from llm_jax.parallel import zero
from llm_jax.parallel.rules import LogicalAxes

Params = dict[str, Any]


# What attention gives, and the log-sum-exp of its scores.
ATTENTION = ("attention_out", "attention_lse")


def _offload(*names: str) -> Callable:
    policy: Callable = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return policy


def _dots(products: Callable, attention: Callable) -> Callable:
    """What matrix products give and, because it costs the most to compute again, what attention gives."""

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        chosen = products if primitive is jax.lax.dot_general_p else attention
        return chosen(primitive, *args, **params)

    return policy


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _dots(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*ATTENTION),
    ),
    "save_attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),
}
OFFLOAD_POLICIES = {  # the same, kept in the host's memory; with "full" that is each layer's input
    "full": _offload("layer_input"),
    "dots": _dots(
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"), _offload(*ATTENTION)
    ),
    "save_attention": _offload(*ATTENTION),
}


def _boxed(config: ModelConfig, key: jax.Array) -> Params:
    """Initialise every module, keeping Flax's boxes with the logical axes."""
    embedding_key, layers_key, head_key = jax.random.split(key, 3)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, config.hidden_size), config.compute_dtype)
    rotary = position_tables(config, tokens_BT, None, None)

    def layer(layer_key: jax.Array) -> Params:
        return Block(config).init(layer_key, x_BTD, AttentionMask(), rotary)["params"]

    params = {
        "embedding": Embedding(config).init(embedding_key, tokens_BT)["params"],
        "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": RMSNorm(config).init(key, x_BTD)["params"],
    }
    if config.output == "reward":
        params["reward_head"] = heads.RewardHead(config).init(head_key, x_BTD)["params"]
    elif not config.tie_embeddings:
        params["head"] = heads.Head(config).init(head_key)["params"]
    return params


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters in `config.param_dtype`: normal(0, init_std) or as in `mup.py`, norms 1, biases 0."""
    return jax.tree.map(lambda box: box.value, _boxed(config, key), is_leaf=_is_box)


def abstract(config: ModelConfig) -> Params:
    """The parameters' shapes and dtypes (`jax.ShapeDtypeStruct`), allocating nothing."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, in the structure of the parameters."""
    boxed = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))

    def names(box: nn.LogicallyPartitioned) -> LogicalAxes:
        stacked = len(box.value.shape) == len(box.names) + 1
        return ("layers", *box.names) if stacked else tuple(box.names)

    return jax.tree.map(names, boxed, is_leaf=_is_box)


def rate_multipliers(config: ModelConfig) -> Params | None:
    """What each parameter's learning rate is multiplied by, in the structure of the parameters; None = 1 everywhere."""
    multipliers: Params | None = mup.rate_multipliers(config, logical_axes(config))
    return multipliers


def without_mup(params: Params, config: ModelConfig) -> tuple[ModelConfig, Params]:
    """The same function in the standard parametrisation: the last norm's scale takes up muP's output multiplier."""
    if not config.mup_base_width:
        return config, params
    scale = params["final_norm"]["scale"] * mup.output_multiplier(config)
    return dataclasses.replace(config, mup_base_width=0), {**params, "final_norm": {"scale": scale}}


def is_stacked(params: Params) -> bool:
    """Whether the layers' parameters lie on a leading axis, as `init` makes them, and not layer by layer."""
    return isinstance(params["layers"], dict)


def count_parameters(config: ModelConfig) -> int:
    """How many parameters the model has, allocating nothing."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(dataclasses.replace(config, quantization="none"))))


def position_tables(
    config: ModelConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, cache: Cache | None
) -> positions.RotaryTables | None:
    """The rotary tables; dynamic NTK goes by a cached row's prompt, else by the length of each packed text."""
    if config.position != "rope":
        return None
    lengths_BT = None
    if config.dynamic_ntk:
        prompts = None if cache is None else cache.context_length[:, None]
        lengths_BT = positions.text_lengths(positions_BT, segment_ids_BT) if prompts is None else prompts
    return positions.rotary_tables(config, positions_BT, lengths_BT)


def attention_mask(
    config: ModelConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, cache: Cache | None
) -> AttentionMask:
    """What may see what, by index; the window is set layer by layer."""
    return AttentionMask(
        query_segment_ids=segment_ids_BT,
        key_segment_ids=segment_ids_BT if cache is None else cache.segment_ids,
        query_offset=None if cache is None else cache.length,
        slopes=jnp.asarray(positions.alibi_slopes(config.num_heads)) if config.position == "alibi" else None,
        query_scale=positions.log_n_scale(positions_BT, config.max_length) if config.log_n else None,
    )


def _apply_layers(
    params: Params,
    config: ModelConfig,
    x_BTD: jax.Array,
    mask: AttentionMask,
    rotary: positions.RotaryTables | None,
    layers_cache: LayerCache | tuple[LayerCache, ...] | None,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, LayerCache | tuple[LayerCache, ...] | None]:
    """Run the block over the layers: scanned, group by group, or unrolled with the same result.

    With a cache nothing is differentiated, and all layers are alike.
    """
    windows = jnp.asarray(config.window_sizes, jnp.int32) if any(config.window_sizes) else None
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)

    def body(x_BTD: jax.Array, layer: tuple) -> tuple[jax.Array, LayerCache | None]:
        layer_params, window, key, cache = layer
        layer_mask = dataclasses.replace(mask, window=window)
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        result: Any = Block(config).apply({"params": layer_params}, x_BTD, layer_mask, rotary, cache, key)
        return result

    layers = (params["layers"], windows, keys, layers_cache)
    if not is_stacked(params):
        return _loop(body, x_BTD, layers)
    if layers_cache is not None:
        return jax.lax.scan(body, x_BTD, layers, unroll=1 if config.scan_layers else config.num_layers)
    groups = config.layer_groups()
    early = params.get("gathered", {}).get("layers", (None,) * len(groups))
    for group, gathered, (masters, *rest) in zip(groups, early, _split(layers, groups)):
        xs, unroll = (zero.attach(masters, gathered), *rest), 1 if config.scan_layers else group.layers
        x_BTD, _ = jax.lax.scan(_remat(body, group, config), x_BTD, xs, unroll=unroll)
    return x_BTD, None


def _remat(body: Callable, group: LayerGroup, config: ModelConfig) -> Callable:
    if group.remat == "none":
        return body
    policy = (OFFLOAD_POLICIES if group.offload else REMAT_POLICIES)[group.remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=not config.scan_layers)


def _split(layers: Any, groups: tuple[LayerGroup, ...]) -> list[Any]:
    """A tree of arrays [L, ...] as one for each group. The gradients of its parts are put together once."""
    if len(groups) == 1:
        return [layers]
    leaves, structure = jax.tree.flatten(layers)
    sizes = [group.layers for group in groups]
    return [jax.tree.unflatten(structure, part) for part in zip(*(jax.lax.split(leaf, sizes) for leaf in leaves))]


def gather_once(params: Params, config: ModelConfig) -> Params:
    """What is gathered of the weights before a step's first microbatch, as `config` says: merge it into `params`.

    `hidden_states` does so itself, at each call, for parameters that come without.

    Returns:
      {} or {"gathered": {"layers": one tree for each group of layers, "embedding": ..., "head": ...}}.
    """
    groups, when = config.layer_groups(), config.gather_tables
    if not is_stacked(params) or {when, *(group.gather for group in groups)} == {"layer"}:
        return {}
    axes, dtype = logical_axes(config), jnp.dtype(config.compute_dtype)
    parts = zip(groups, _split(params["layers"], groups))
    early: Params = {"layers": [zero.gather_early(part, axes["layers"], group.gather, dtype) for group, part in parts]}
    # The rows of a NormHead are normalised on the master's shards, each time it is used.
    tables = {"embedding"} if config.norm_head else {"embedding", "head"}
    early |= {name: zero.gather_early(params[name], axes[name], when, dtype) for name in tables & params.keys()}
    return {"gathered": early}


def _loop(body: Callable, x_BTD: jax.Array, layers: tuple) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    """`jax.lax.scan` over parameters and caches that lie apart, layer by layer."""
    params, windows, keys, caches = layers
    new_caches = []
    for i, layer_params in enumerate(params):
        window, key = (None if array is None else array[i] for array in (windows, keys))
        x_BTD, cache = body(x_BTD, (layer_params, window, key, None if caches is None else caches[i]))
        new_caches.append(cache)
    return x_BTD, None if caches is None else tuple(new_caches)


def neftune_noise(
    shape: tuple[int, int, int],
    alpha: float,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    """Noise for embedded tokens of a shape [B, T, D], float32: uniform in +-alpha / sqrt(length * D), 0 for padding.

    NEFTune (Jain et al., 2023), algorithm 1. The length is that of the text that a token belongs to: the last position
    plus one of its segment.
    """
    lengths_BT = positions.text_lengths(positions_BT, segment_ids_BT).astype(jnp.float32)
    bounds_BT = alpha * jax.lax.rsqrt(lengths_BT * shape[-1])
    if segment_ids_BT is not None:
        bounds_BT = jnp.where(segment_ids_BT > 0, bounds_BT, 0.0)
    return bounds_BT[..., None] * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    dropout_key: jax.Array | None = None,
) -> Any:
    """Final hidden states after the last norm, with muP times its output multiplier.

    Args:
      params: as from `init`.
      config: the model.
      tokens: token ids [B, T], int32.
      positions: [B, T] int32; by default 0, 1, 2, ..., continuing after the cache's filled slots.
      segment_ids: [B, T] int32; a token sees only its own segment, and segment 0 is padding.
      cache: keys and values of earlier tokens; needs T free slots (writing past the end is the caller's error). With
        dynamic NTK each row is one text, and its first call here, or `init_cache`, tells how long the prompt is.
      dropout_key: turns dropout on, at `config.dropout_rate`, and NEFTune's noise, at `config.neftune_alpha`.

    Returns:
      [B, T, D] in the compute dtype; with a cache, the pair of it and the new cache.
    """
    if positions is None:
        start = 0 if cache is None else cache.length
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if cache is not None:
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        filled = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
        cache = cache._replace(segment_ids=filled).know_context(positions, segment_ids)
    elif "gathered" not in params:
        params = {**params, **gather_once(params, config)}
    embedding_key, layers_key, noise_key = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    with jax.named_scope("embedding"):
        x_BTD: Any = Embedding(config).apply({"params": zero.attached(params, "embedding")}, tokens)
        if noise_key is not None and config.neftune_alpha:
            noise_BTD = neftune_noise(x_BTD.shape, config.neftune_alpha, positions, segment_ids, noise_key)
            x_BTD += noise_BTD.astype(x_BTD.dtype)
        x_BTD = dropout(x_BTD, config.dropout_rate, embedding_key)
    mask = attention_mask(config, positions, segment_ids, cache)
    rotary = position_tables(config, positions, segment_ids, cache)
    layers_cache = None if cache is None else cache.layers
    with jax.named_scope("layers"):
        x_BTD, layers_cache = _apply_layers(params, config, x_BTD, mask, rotary, layers_cache, layers_key)
    x_BTD = RMSNorm(config).apply({"params": params["final_norm"]}, x_BTD)
    if config.mup_base_width:
        x_BTD *= mup.output_multiplier(config)
    if cache is None or layers_cache is None:
        return x_BTD
    return x_BTD, cache._replace(layers=layers_cache, length=cache.length + tokens.shape[1])


def logits(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
) -> Any:
    """Next-token logits [B, T, V], float32; with a cache, the pair of them and the new cache. See `hidden_states`."""
    result = hidden_states(params, config, tokens, positions=positions, segment_ids=segment_ids, cache=cache)
    if cache is None:
        return heads.unembed(params, config, result)
    hidden_BTD, cache = result
    return heads.unembed(params, config, hidden_BTD), cache
