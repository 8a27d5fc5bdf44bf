"""The settings of the comparison of methods on word tasks."""

import dataclasses

from llm_jax.alignment.config import DpoConfig, SftConfig
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.alignment.words import KINDS
from llm_jax.config import ModelConfig, non_negative, one_of, positive
from llm_jax.errors import require

TEMPLATE = "baichuan2"  # two marks a task
TITLES = {
    "ppo": "PPO",
    "grpo": "GRPO",
    "rejection": "rejection sampling",
    "rejection_forgets": "rejection sampling, last round alone",
    "dpo": "DPO on pairs",
}


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """The tasks, the model, how it starts, and what each method does with it."""

    words: int = 4000  # the most widespread of the standard library's
    kinds: tuple[str, ...] = tuple(KINDS)
    holdout_fraction: float = 0.1  # of the words, and of the sequences
    examples: int = 0  # answered tasks of different forms, in front of every task
    template: str = TEMPLATE  # as ChatDataConfig.template
    base: str = ""  # a trained model that starts as it is; "" = one of `model`, fine-tuned by `sft` to `target`
    demonstrations: int = 0  # tasks of each kind whose answers the start is fine-tuned on; 0 = all
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    target: float = 0.45  # of the held-out tasks, solved by sampling: the first checkpoint of `sft` that does it starts
    ppo: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    grpo: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    rejection: RejectionConfig = dataclasses.field(default_factory=RejectionConfig)
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
    methods: tuple[str, ...] = tuple(TITLES)
    seeds: tuple[int, ...] = (0, 1, 2)
    judged: int = 1024  # held-out tasks, at most
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        positive(self, "words", "judged", "max_new_tokens")
        non_negative(self, "demonstrations", "examples")
        require(0 < self.target < 1, f"WordsConfig.target={self.target} must be in (0, 1)")
        require(0 < self.holdout_fraction < 1, "WordsConfig.holdout_fraction must be in (0, 1)")
        for name in self.methods:
            one_of("WordsConfig.methods", name, tuple(TITLES))
        for field in ("kinds", "methods", "seeds"):
            values = getattr(self, field)
            require(
                bool(values) and len(set(values)) == len(values),
                f"WordsConfig.{field}={values} must be some different ones",
            )
        drawn = {name: self.samples(name) for name in self.methods}
        require(
            len(set(drawn.values())) == 1,
            f"the methods draw different numbers of samples, and could not be compared: {drawn}",
        )

    def samples(self, method: str) -> int:
        """Responses that a method draws in all."""
        if method in ("ppo", "grpo"):
            policy: PpoConfig = getattr(self, method)
            return policy.training.steps * policy.rollout.prompts * policy.rollout.sampling.num_samples
        return self.rejection.rounds * self.rejection.samples
