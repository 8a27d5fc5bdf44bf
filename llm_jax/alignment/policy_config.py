"""How a policy is trained on its own responses: the losses, the price of leaving the reference, the rewards' scale.

The defaults are ours; `configs/ppo` holds what the reports state.
"""

import dataclasses
from typing import Any

from llm_jax.alignment.config import CHAT_FORMATS, FineTuneConfig
from llm_jax.config import CheckpointConfig, OptimizerConfig, SamplingConfig, non_negative, one_of, positive
from llm_jax.errors import require
from llm_jax.tokenization.chat import TEMPLATES

KL_KINDS = ("fixed", "scheduled", "adaptive")
NORMALIZATIONS = ("none", "whiten", "running_mean", "running_std", "running_both")
ADVANTAGES = ("gae", "grpo", "rloo")
WEIGHTS = ("float32", "bfloat16", "int8")
PROMPT_FORMATS = (*CHAT_FORMATS, "prompt")


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """What the policy and its critic minimise; see `losses.policy`."""

    clip: float = 0.2  # of the ratio of new to old probability; 0 = none
    max_log_ratio: float = 20.0  # beyond it a token has no gradient
    kl_coefficient: float = 0.0  # of k3 to the reference in the loss itself, as in GRPO; KlConfig's is in the reward
    entropy_coefficient: float = 0.0  # of the entropy, which is raised
    per_sequence: bool = False  # the mean over responses of each one's mean, as in GRPO; False = the mean over tokens
    value_clip: float = 0.2  # of the critic's change; 0 = none

    def __post_init__(self) -> None:
        positive(self, "max_log_ratio")
        non_negative(self, "clip", "kl_coefficient", "entropy_coefficient", "value_clip")
        require(self.clip < 1, f"PolicyLossConfig.clip={self.clip} must be below 1: a ratio is never negative")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How good a token was: by a critic, or by comparison with other responses to the same prompt."""

    kind: str = "gae"  # gae: critic. grpo, rloo: groups, no critic
    gamma: float = 1.0
    lam: float = 0.95  # of generalised advantage estimation
    whiten: bool = True  # over all tokens of an iteration's batch; gae only

    def __post_init__(self) -> None:
        one_of("AdvantageConfig.kind", self.kind, ADVANTAGES)
        for field in ("gamma", "lam"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"AdvantageConfig.{field}={value} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class KlConfig:
    """The price of each nat by which the policy leaves the reference, taken from the reward of every token."""

    kind: str = "fixed"  # scheduled: to `end`. adaptive: so that the KL is `target`
    coefficient: float = 0.05  # at the start
    end: float = 0.0  # scheduled only, as the next: reached after so many iterations, linearly, and kept
    iterations: int = 0
    target: float = 6.0  # adaptive only, as the rest: nats a response (Ziegler et al., 2019, section 2.2)
    gain: float = 0.1  # how much an iteration may change the coefficient: by `gain` times a relative error of up to 0.2

    def __post_init__(self) -> None:
        one_of("KlConfig.kind", self.kind, KL_KINDS)
        non_negative(self, "coefficient", "end", "iterations")
        positive(self, "target", "gain")
        require(
            (self.kind == "scheduled") == (self.iterations > 0),
            f"KlConfig.iterations={self.iterations} with kind={self.kind!r}: a schedule needs its length, and nothing "
            "else has one",
        )
        require(
            self.kind != "adaptive" or self.coefficient > 0,
            "KlConfig.coefficient=0 with kind='adaptive' would stay 0: it is multiplied",
        )


@dataclasses.dataclass(frozen=True)
class RewardShapingConfig:
    """What is done to a batch's scores before they are rewards: in this order."""

    logit: bool = False  # of scores in (0, 1), as LLaMA-2 does before it whitens
    # whiten: over the batch (LLaMA-2). running_*: by moments of all scores so far, the batch's included; running_mean
    # subtracts their mean (Qwen), running_std divides by their standard deviation, running_both does both.
    normalization: str = "none"
    limit: float = 0.0  # scores are kept within +-limit; 0 = none
    missing_end_penalty: float = 0.0  # subtracted, at last, where a response has no end token

    def __post_init__(self) -> None:
        one_of("RewardShapingConfig.normalization", self.normalization, NORMALIZATIONS)
        non_negative(self, "limit", "missing_end_penalty")


@dataclasses.dataclass(frozen=True)
class PromptDataConfig:
    """Which prompts a policy answers, and how they are written."""

    path: str = ""  # a file or folder of .jsonl, .jsonl.gz or .json: prompts, or conversations without their last reply
    format: str = "auto"  # of the records; auto = each record's own
    template: str = "auto"  # as ChatDataConfig.template; none = a prompt is the beginning of a text
    max_tokens: int = 256  # longer prompts are left out
    holdout_fraction: float = 0.0  # of the prompts, chosen by a hash of their first message
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("PromptDataConfig.format", self.format, PROMPT_FORMATS)
        one_of("PromptDataConfig.template", self.template, ("none", *TEMPLATES))
        positive(self, "max_tokens")
        non_negative(self, "seed")
        fraction = self.holdout_fraction
        require(0 <= fraction < 1, f"PromptDataConfig.holdout_fraction={fraction} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a policy answers the prompts of an iteration: draws whose logprobs the update can do again."""

    prompts: int = 64  # of an iteration, in all processes; each has `sampling.num_samples` responses
    max_prompt_tokens: int = 256
    # Drawn at once in each process; the next prompts take over those that are done. 0 = all of an iteration at once
    rows: int = 0
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        positive(self, "prompts", "max_prompt_tokens")
        non_negative(self, "rows")
        samples = self.sampling.num_samples
        require(
            self.rows % samples == 0,
            f"RolloutConfig.rows={self.rows} must be a multiple of sampling.num_samples={samples}: a prompt's samples "
            "begin together",
        )
        _require_policy_gradient(self.sampling)

    @property
    def length(self) -> int:
        """Tokens of a row of rollouts, T: the longest prompt and the longest response."""
        return self.max_prompt_tokens + self.sampling.max_new_tokens

    def sampled(self, **changes: Any) -> "RolloutConfig":
        """The same with some of `sampling` changed."""
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **changes))


def _require_policy_gradient(sampling: SamplingConfig) -> None:
    """Raise `UserError` where the policy gradient of these draws would be another than the update computes."""
    require(
        sampling.temperature > 0,
        "RolloutConfig.sampling.temperature=0: greedy responses have no alternatives to be better than; set it above 0",
    )
    require(
        sampling.top_k == 0,
        f"RolloutConfig.sampling.top_k={sampling.top_k}: the update's logprobs are those of the whole vocabulary, and "
        "top-k may draw from any small part of it; set 0, or bound what is left out by top_p",
    )
    require(
        sampling.repetition_penalty == 1,
        f"RolloutConfig.sampling.repetition_penalty={sampling.repetition_penalty}: it draws from other logits than "
        "those that the update computes, so that its ratios would be wrong; set 1",
    )
    require(
        sampling.cache_dtype != "int8",
        "RolloutConfig.sampling.cache_dtype='int8': rounded keys and values give other logprobs than the update "
        "computes; set ''",
    )


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """What the critic begins as, and how it learns; see PolicyLossConfig.value_clip too."""

    model: str = ""  # the run folder of a reward model, or any model of the policy's tokenizer; "" = the policy
    warmup_iterations: int = 0  # at the start, in which the critic alone learns
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
    )

    def __post_init__(self) -> None:
        non_negative(self, "warmup_iterations")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """Pre-training data beside a policy's own responses, against forgetting (PTX)."""

    dataset: str = ""  # a folder of prepare_data; "" = none
    coefficient: float = 0.0  # of its mean cross-entropy, beside the mean loss of the responses
    sequence_length: int = 512
    batch_size: int = 8  # sequences beside every minibatch
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "sequence_length", "batch_size")
        non_negative(self, "coefficient", "seed")
        require(
            (self.coefficient > 0) == bool(self.dataset),
            "PretrainingConfig.dataset and coefficient go together: set both, or neither",
        )


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """A run of PPO, GRPO or RLOO."""

    # The policy: what it begins as, its optimiser, adapters, mesh and checkpoints. `steps` are iterations.
    training: FineTuneConfig = dataclasses.field(
        default_factory=lambda: FineTuneConfig(
            steps=200,
            log_every=1,
            eval_every=20,
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_steps=0),
            checkpoint=CheckpointConfig(every_steps=20, keep_last=1),
        )
    )
    prompts: PromptDataConfig = PromptDataConfig()
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: str = ""  # the run folder of a reward model, or MODULE:FUNCTION of prompts and responses
    safety_reward: str = ""  # likewise: decides where it is low and for unsafe prompts (LLaMA-2, section 3.2.3)
    safety_threshold: float = 0.15  # the probability of being safe, sigmoid(safety_reward), below which it decides
    epochs: int = 1  # passes over the responses of an iteration
    minibatch_size: int = 16  # responses of an update; FineTuneConfig.microbatches divides it further
    loss: PolicyLossConfig = PolicyLossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KlConfig = KlConfig()
    rewards: RewardShapingConfig = RewardShapingConfig()
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    pretraining: PretrainingConfig = PretrainingConfig()
    stop_kl: float = 0.0  # an iteration's policy updates end when one finds the old policy this far away; 0 = never
    # How the weights of what is not trained are kept: float32, bfloat16 or int8. With adapters, the reference is the
    # model beside them, as FineTuneConfig.quantize says.
    reference_weights: str = "float32"
    reward_weights: str = "float32"
    offload: bool = False  # reference and reward models, to the host's memory while they are not used
    logprob_tolerance: float = 0.01  # largest difference between the sampler's and the trainer's log-probabilities
    eval_prompts: int = 64  # held-out ones
    samples: int = 4  # held-out prompts whose responses are written to samples.jsonl at every evaluation

    def __post_init__(self) -> None:
        positive(self, "epochs", "minibatch_size", "logprob_tolerance")
        non_negative(self, "stop_kl", "eval_prompts", "samples")
        one_of("PpoConfig.reference_weights", self.reference_weights, WEIGHTS)
        one_of("PpoConfig.reward_weights", self.reward_weights, WEIGHTS)
        responses = self.rollout.prompts * self.rollout.sampling.num_samples
        require(
            responses % self.minibatch_size == 0,
            f"PpoConfig.minibatch_size={self.minibatch_size} does not divide the {responses} responses of an iteration "
            f"({self.rollout.prompts} prompts, {self.rollout.sampling.num_samples} responses to each)",
        )
        require(
            self.advantage.kind == "gae" or self.rollout.sampling.num_samples > 1,
            f"AdvantageConfig.kind={self.advantage.kind!r} compares responses to the same prompt: set "
            "RolloutConfig.sampling.num_samples to 2 or more",
        )
        require(
            self.prompts.max_tokens <= self.rollout.max_prompt_tokens,
            f"PromptDataConfig.max_tokens={self.prompts.max_tokens} lets prompts through that are longer than "
            f"RolloutConfig.max_prompt_tokens={self.rollout.max_prompt_tokens}: make them equal",
        )
        require(
            self.training.dropout_rate == 0 and self.training.neftune_alpha == 0,
            "PpoConfig.training: dropout and NEFTune's noise must be 0, as a ratio compares a policy with itself",
        )
        require(
            self.training.steps > 0 and self.training.epochs == 1,
            "PpoConfig.training.steps is the number of iterations, and must be positive; passes over an iteration's "
            "responses are PpoConfig.epochs",
        )
        require(
            self.critic.warmup_iterations == 0 or self.advantage.kind == "gae",
            f"CriticConfig.warmup_iterations={self.critic.warmup_iterations}: AdvantageConfig.kind="
            f"{self.advantage.kind!r} has no critic to warm up",
        )
        require(
            self.critic.warmup_iterations < self.training.steps,
            f"CriticConfig.warmup_iterations={self.critic.warmup_iterations} leaves nothing of the "
            f"{self.training.steps} iterations to the policy",
        )
