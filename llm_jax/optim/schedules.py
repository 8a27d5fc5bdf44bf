"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import OptimizerConfig
from llm_jax.errors import require


@flax.struct.dataclass
class Schedule:
    """The learning rate of update `step` = 0, 1, ... as a float32 scalar: `schedule(step)`.

    A pytree, so that one compiled step serves runs of every peak, warm-up and length. `kind` and `final_fraction` are
    compiled in.
    """

    peak: jax.typing.ArrayLike  # float32 scalar, like the two below
    warmup_steps: jax.typing.ArrayLike
    last_step: jax.typing.ArrayLike
    kind: str = flax.struct.field(pytree_node=False)
    final_fraction: float = flax.struct.field(pytree_node=False)

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of one update."""
        done = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((done + 1.0) / jnp.maximum(self.warmup_steps, 1.0), 1.0)
        length = jnp.maximum(jnp.subtract(self.last_step, self.warmup_steps), 1.0)
        peak = jnp.asarray(self.peak, jnp.float32)
        return peak * ramp * self._decay(jnp.clip((done - self.warmup_steps) / length, 0.0, 1.0))

    def _decay(self, progress: jax.Array) -> jax.Array:
        """The factor of the peak after `progress` (0 to 1) of the decay."""
        if self.kind == "constant":
            return jnp.ones_like(progress)
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.final_fraction + (1.0 - self.final_fraction) * left


def learning_rate(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The schedule of a run of `total_steps`.

    Warm-up multiplies the peak by (step + 1) / warmup_steps, so the first update already learns. From the end of
    warm-up to `config.decay_steps` (or `total_steps`, where that is 0) cosine and linear go from the peak to
    `config.final_fraction` of it and stay there; constant stays at the peak.

    Raises `UserError` if the warm-up would not end before the decay does.
    """
    last_step = config.decay_steps or total_steps
    require(
        config.schedule == "constant" or config.warmup_steps < last_step,
        f"OptimizerConfig.warmup_steps={config.warmup_steps} must be below the {last_step} steps of the schedule; "
        "lower it",
    )
    return Schedule(
        peak=np.float32(config.learning_rate),
        warmup_steps=np.float32(config.warmup_steps),
        last_step=np.float32(last_step),
        kind=config.schedule,
        final_fraction=config.final_fraction,
    )
