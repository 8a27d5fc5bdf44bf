"""AdamW with decoupled weight decay, a global-norm clip and an explicit rule for what decays."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import OptimizerConfig
from llm_jax.errors import require
from llm_jax.optim.schedules import Schedule

PyTree = Any


class DecayRule(NamedTuple):
    """Parameters whose whole path (names joined by "/") matches `pattern` decay, or do not."""

    kind: str
    pattern: str
    decays: bool


# Every parameter must match exactly one of these. A new kind of parameter needs a decision here, not a default.
DECAY_RULES = (
    DecayRule("scale of a norm", r"(.*/)?\w*norm\w*/scale", False),
    DecayRule("bias", r"(.*/)?bias", False),
    DecayRule("matrix", r"(.*/)?kernel", True),
    DecayRule("factor of an adapter", r"(.*/)?kernel/(down|up)", True),
    DecayRule("embedding", r"(.*/)?embedding", True),
)


def decay_mask(params: PyTree) -> PyTree:
    """A tree of bools: true where weight decay applies (matrices, embeddings), false on norms' scales and biases.

    Raises `UserError` naming a parameter that no rule, or more than one, covers.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _decays(_name(path)), params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _decays(name: str) -> bool:
    rules = [rule for rule in DECAY_RULES if re.fullmatch(rule.pattern, name)]
    kinds = " and ".join(rule.kind for rule in rules) or "no rule"
    require(len(rules) == 1, f"weight decay: parameter {name!r} matches {kinds}; decide in optim/adamw.py DECAY_RULES")
    return rules[0].decays


def without_schedule(config: OptimizerConfig) -> OptimizerConfig:
    """The config with its schedule's fields at their defaults: what `build` depends on."""
    schedule = ("learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction")
    default = OptimizerConfig()
    return dataclasses.replace(config, **{field: getattr(default, field) for field in schedule})


def build(
    config: OptimizerConfig,
    decay_mask: PyTree | Callable[[PyTree], PyTree],
    rate_multipliers: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip to the global norm, then AdamW at the scheduled rate; moments and updates are float32.

    Args:
      config: the hyper-parameters, without those of the schedule; `clip_norm=0` leaves the gradients as they are.
      decay_mask: a tree of bools like the parameters, or the function that makes it (`adamw.decay_mask`).
      rate_multipliers: a tree of floats like the parameters, by which each one's learning rate is multiplied; its
        weight decay is not. None = 1 everywhere.

    Returns a transformation whose `update(gradients, state, params, schedule=schedule)` needs the parameters and a
    `Schedule`. With p the parameters, m and v the bias-corrected moments:
    update = -rate * (multiplier * m / (sqrt(v) + eps) + weight_decay * p where the mask is true).
    """
    clip = [_clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return _in_float32(
        optax.chain(
            *clip,
            _scale_by_adam(config, rate_multipliers),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            _scale_by_schedule(),
        )
    )


def global_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, a float32 scalar.

    Written with sums of squares because `jnp.vdot` flattens its arguments, which gathers a sharded array whole.
    """
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum((jnp.sum(leaf * leaf) for leaf in leaves), start=jnp.zeros((), jnp.float32)))


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        factor = limit / jnp.maximum(global_norm(updates), limit)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_adam(config: OptimizerConfig, multipliers: PyTree | None) -> optax.GradientTransformation:
    """Adam's direction, times each parameter's multiplier."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if multipliers is None:
        return adam

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        updates, state = adam.update(updates, state, params)
        return jax.tree.map(jnp.multiply, updates, multipliers), state

    return optax.GradientTransformation(adam.init, update)


def _scale_by_schedule() -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` with the schedule as an argument of the update."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, *, schedule: Schedule, **_: Any
    ) -> tuple[PyTree, PyTree]:
        descent = optax.scale_by_learning_rate(schedule)
        return descent.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.scale_by_learning_rate(lambda step: step).init, update)


def _in_float32(transformation: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transformation as if gradients and parameters were float32, so that its state is too."""

    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        return transformation.update(cast(updates), state, cast(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: transformation.init(cast(params)), update)
