"""The settings of rejection sampling fine-tuning."""

import dataclasses
import math

from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.policy_config import WEIGHTS, PromptDataConfig, RolloutConfig
from llm_jax.config import non_negative, one_of, positive
from llm_jax.errors import require

MEMORIES = ("all", "last")


def _check_temperatures(name: str, temperatures: tuple[float, ...]) -> None:
    require(
        all(temperature > 0 for temperature in temperatures) and len(set(temperatures)) == len(temperatures),
        f"{name}.temperatures={temperatures} must be different ones above 0",
    )


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    """What is drawn, before the first round and after the last, to see what more samples and other temperatures do."""

    prompts: int = 0  # held-out ones; 0 = nothing is drawn
    samples: int = 32  # of each prompt
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2, 1.4)

    def __post_init__(self) -> None:
        non_negative(self, "prompts")
        positive(self, "samples")
        _check_temperatures("CurvesConfig", self.temperatures)
        require(bool(self.temperatures), "CurvesConfig.temperatures is empty: name one at least")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """A run of rejection sampling fine-tuning (LLaMA-2, section 3.2.3): rounds of drawing and fine-tuning."""

    # Of every round; `model` is what the first one draws from, each later one continues from the one before it.
    training: FineTuneConfig = dataclasses.field(default_factory=lambda: FineTuneConfig(eval_every=0, keep_best=False))
    prompts: PromptDataConfig = dataclasses.field(default_factory=PromptDataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)  # sampling.num_samples of each prompt
    reward: str = ""  # the run folder of a reward model, or MODULE:FUNCTION of prompts and responses
    reward_weights: str = "float32"  # how the reward model's are kept: a dtype, or int8
    offload: bool = False  # the reward model, to the host's memory while it is not used
    rounds: int = 4
    batches: int = 8  # of rollout.prompts prompts, which a round draws
    # Which rounds' samples a prompt's best is taken of. all: every one so far. last: the newest, forgetting the others,
    # after which LLaMA-2's models got worse at some things.
    memory: str = "all"
    # Tried at the start of every round, on its first batch: that with the highest mean reward of the best samples is
    # taken. () = rollout.sampling.temperature.
    temperatures: tuple[float, ...] = ()
    minimum_reward: float = -math.inf  # prompts whose best sample is below are not learned from
    only_ended: bool = True  # samples that are cut off before their end are never chosen
    data: ChatDataConfig = dataclasses.field(  # sequence_length, batch_size, packed and seed
        default_factory=lambda: ChatDataConfig(sequence_length=512, batch_size=16, holdout_fraction=0.0)
    )
    eval_prompts: int = 64  # held-out ones, answered once after every round
    curves: CurvesConfig = CurvesConfig()

    def __post_init__(self) -> None:
        positive(self, "rounds", "batches")
        non_negative(self, "eval_prompts")
        one_of("RejectionConfig.memory", self.memory, MEMORIES)
        one_of("RejectionConfig.reward_weights", self.reward_weights, WEIGHTS)
        _check_temperatures("RejectionConfig", self.temperatures)
        require(
            self.prompts.max_tokens <= self.rollout.max_prompt_tokens,
            f"PromptDataConfig.max_tokens={self.prompts.max_tokens} lets prompts through that are longer than "
            f"RolloutConfig.max_prompt_tokens={self.rollout.max_prompt_tokens}: make them equal",
        )
        require(
            self.rollout.length <= self.data.sequence_length,
            f"RejectionConfig.data.sequence_length={self.data.sequence_length} is less than the {self.rollout.length} "
            "tokens that the longest prompt and response may have together: raise it",
        )
        require(
            self.data.path == "" and self.data.holdout_fraction == 0,
            "RejectionConfig.data.path and holdout_fraction are not used: the samples are what is learned; leave them "
            "at '' and 0",
        )

    @property
    def samples(self) -> int:
        """Responses that a round draws, without those that temperatures are tried on."""
        return self.batches * self.rollout.prompts * self.rollout.sampling.num_samples
