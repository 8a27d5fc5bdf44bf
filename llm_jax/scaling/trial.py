"""A trial of a sweep and what came of it: the one form in which sweeps, fits, figures and notebooks hand results on."""

import dataclasses

from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.scaling import flops

# Files of a trial's folder, beside those of its run.
CONFIG = "config.json"
FAILURE = "failure.txt"  # why its last try ended: one line, then the traceback


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run; `name` is its folder's, too."""

    name: str
    size: str
    config: TrainConfig
    varied: tuple[str, ...] = ()  # "key=value" of the grid's further keys

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.config.steps * self.config.data.batch_size * self.config.data.sequence_length

    @property
    def compute(self) -> float:
        """FLOPs of its training, exactly: `flops.training_flops`."""
        return flops.training_flops(self.config.model, self.config.data.sequence_length, self.tokens)


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    `curve` holds (tokens, held-out loss) in the order of training; its last point is the end, with `loss`. Losses are
    in nats per token. The learning rate had decayed only at the end, so that all points but the last lie above
    what a run planned to end there would reach.
    """

    name: str
    size: str
    model: ModelConfig
    sequence_length: int
    parameters: int  # all
    non_embedding_parameters: int  # without the input embedding and the output head
    tokens: int
    unique_tokens: int  # of the training set, where it was read more than once; else = tokens
    compute: float  # training FLOPs, exactly: `flops.training_flops`
    learning_rate: float  # the peak
    seed: int
    loss: float  # held-out, after the last step
    curve: tuple[tuple[int, float], ...]
    varied: tuple[str, ...] = ()  # "key=value" of the grid's further keys
    held_out: bool = False  # from the fits, which predict it
