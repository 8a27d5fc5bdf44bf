"""The settings of steering reviews: texts, the model that continues them, rewards, methods, and how all are judged."""

import dataclasses

from llm_jax.alignment.config import DpoConfig, RewardConfig, SftConfig
from llm_jax.alignment.policy_config import PpoConfig, RolloutConfig
from llm_jax.alignment.ratings import CHINESE_DOMAIN, DOMAINS
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.config import ModelConfig, one_of, positive
from llm_jax.errors import require

BEST_OF_N = "best_of_n"


@dataclasses.dataclass(frozen=True)
class SteeringConfig:
    """A study of how much reward methods have for how far they go."""

    domains: tuple[str, ...] = ("movies", "products", CHINESE_DOMAIN)  # of the rated texts
    languages: tuple[str, ...] = ("en", "zh")
    judged_fraction: float = 0.1  # of the texts, whose first words all are judged on
    # Of the texts, whose first words are the prompts in training, and from whose ratings the unpaid regressor learns.
    # What is left is what the policy is fine-tuned on and what the reward model is trained on.
    referee_fraction: float = 0.3
    # Where sft.training.model is "": a model with random weights, and a vocabulary of the texts.
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)  # training.model: "" = the start
    ppo: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    ppo_betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    rejection: RejectionConfig = dataclasses.field(default_factory=RejectionConfig)
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
    dpo_betas: tuple[float, ...] = (0.03, 0.1, 0.3)
    dpo_batches: int = 16  # of rejection.rollout, of which each prompt's best and worst response are a pair
    seeds: tuple[int, ...] = (0, 1, 2)
    judging: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    judged: int = 256  # held-out prompts, at most
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    best_of_samples: int = 32  # of the start, for each prompt

    def __post_init__(self) -> None:
        positive(self, "judged_fraction", "referee_fraction", "dpo_batches", "judged", "best_of_samples")
        require(
            self.judged_fraction + self.referee_fraction < 1,
            "SteeringConfig.judged_fraction and referee_fraction leave no text to learn from: lower them",
        )
        for name in self.domains:
            one_of("SteeringConfig.domains", name, (*DOMAINS, CHINESE_DOMAIN))
        for field in ("domains", "languages", "seeds", "best_of"):
            values = getattr(self, field)
            require(
                bool(values) and len(set(values)) == len(values),
                f"SteeringConfig.{field}={values} must be some different ones",
            )
        require(
            0 < min(self.best_of) <= max(self.best_of) <= self.best_of_samples,
            f"SteeringConfig.best_of={self.best_of} must be from 1 to best_of_samples={self.best_of_samples}",
        )

    @property
    def held_out(self) -> float:
        """The fraction of texts that nothing but the unpaid regressor learns from."""
        return self.judged_fraction + self.referee_fraction

    @property
    def runs(self) -> dict[str, tuple[str, float]]:
        """The method and the beta of every run, but for its seed."""
        return {
            BEST_OF_N: (BEST_OF_N, 0.0),
            **{f"ppo_{beta:g}": ("ppo", beta) for beta in self.ppo_betas},
            **{f"dpo_{beta:g}": ("dpo", beta) for beta in self.dpo_betas},
            "rejection": ("rejection", 0.0),
        }
