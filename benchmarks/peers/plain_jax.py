"""A LLaMA-style train step as one would first write it in JAX: einsums, a scan over layers, log_softmax, Optax.

Legend: B batch, T query length, S key length, D model, N heads, H head dim, F feed-forward.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import shapes
from benchmarks.peers.serve import serve


def init(shape: shapes.Shape, key: jax.Array) -> Any:
    """Parameters, those of the layers stacked."""
    L, D, F, N = shape.layers, shape.hidden, shape.ffn, shape.heads
    H = D // N
    sizes = {
        "query": (L, D, N, H),
        "key": (L, D, N, H),
        "value": (L, D, N, H),
        "output": (L, N, H, D),
        "gate": (L, D, F),
        "up": (L, D, F),
        "down": (L, F, D),
        "embedding": (shape.vocabulary, D),
        "head": (D, shape.vocabulary),
    }
    keys = jax.random.split(key, len(sizes))
    arrays = {name: 0.02 * jax.random.normal(k, size) for k, (name, size) in zip(keys, sizes.items(), strict=True)}
    outer = {name: arrays.pop(name) for name in ("embedding", "head")}
    norms = {"attention_norm": jnp.ones((L, D)), "ffn_norm": jnp.ones((L, D))}
    return {**outer, "norm": jnp.ones(D), "layers": {**arrays, **norms}}


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def _rotate(x_BTNH: jax.Array) -> jax.Array:
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    angles = jnp.arange(T)[:, None, None] * 1e4 ** (-jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _layer(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    y = _norm(x_BTD, layer["attention_norm"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", y, layer[name]) for name in ("query", "key", "value"))
    q, k = _rotate(q), _rotate(k)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30))
    x_BTD += jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), layer["output"])
    y = _norm(x_BTD, layer["ffn_norm"])
    gate, up = (jnp.einsum("btd,df->btf", y, layer[name]) for name in ("gate", "up"))
    return x_BTD + jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, layer["down"]), None


def loss(params: Any, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    x_BTD, _ = jax.lax.scan(_layer, params["embedding"][tokens_BT], params["layers"])
    logprobs = jax.nn.log_softmax(_norm(x_BTD, params["norm"]) @ params["head"])
    return -jnp.mean(jnp.take_along_axis(logprobs, targets_BT[..., None], axis=-1))


def main(name: str) -> None:
    """Serve train steps of the shape called `name`."""
    shape = shapes.SHAPES[name]
    rate, decay, (b1, b2) = shapes.LEARNING_RATE, shapes.WEIGHT_DECAY, shapes.BETAS
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=shapes.EPS, weight_decay=decay)
    optimizer = optax.chain(optax.clip_by_global_norm(shapes.CLIP_NORM), adamw)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(current: Any, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[Any, jax.Array]:
        params, state = current
        value, gradients = jax.value_and_grad(loss)(params, tokens_BT, targets_BT)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = init(shape, jax.random.key(0))
    current = (params, optimizer.init(params))
    ids = jax.random.randint(jax.random.key(1), (shape.batch, shape.length + 1), 0, shape.vocabulary)
    tokens_BT, targets_BT = jnp.array(ids[:, :-1]), jnp.array(ids[:, 1:])

    def step() -> float:
        nonlocal current
        current, value = update(current, tokens_BT, targets_BT)
        jax.block_until_ready(current)
        return float(value)

    serve(step, library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
