"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant."""

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import OptimizerConfig
from llm_jax.errors import require


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update `step` = 0, 1, ... as a float32 scalar.

    Warm-up multiplies the peak by (step + 1) / warmup_steps, so the first update already learns. From the end of
    warm-up to `config.decay_steps` (or `total_steps`, where that is 0) cosine and linear go from the peak to
    `config.final_fraction` of it and stay there; constant stays at the peak.

    Raises `UserError` if the warm-up would not end before the decay does.
    """
    last_step = config.decay_steps or total_steps
    warmup = config.warmup_steps
    require(
        config.schedule == "constant" or warmup < last_step,
        f"OptimizerConfig.warmup_steps={warmup} must be below the {last_step} steps of the schedule; lower it",
    )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((done + 1.0) / max(warmup, 1), 1.0)
        progress = jnp.clip((done - warmup) / max(last_step - warmup, 1), 0.0, 1.0)
        return config.learning_rate * ramp * _decay(config, progress)

    return schedule


def _decay(config: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """The factor of the peak after `progress` (0 to 1) of the decay."""
    if config.schedule == "constant":
        return jnp.ones_like(progress)
    left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.final_fraction + (1.0 - config.final_fraction) * left
