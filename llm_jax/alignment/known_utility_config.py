"""The settings of the study of RLHF with known utilities."""

import dataclasses

from llm_jax.alignment.config import DpoConfig, RewardConfig, SftConfig
from llm_jax.alignment.policy_config import PpoConfig, RolloutConfig
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.config import SamplingConfig, non_negative, one_of, positive
from llm_jax.errors import require

TEMPLATE = "llama2"  # plain words and the end of a text: any tokenizer has room for it
TITLES = {
    "llama2": "PPO as in LLaMA-2",
    "llama2_ptx": "LLaMA-2's with PTX",
    "helpfulness": "LLaMA-2's, helpfulness alone",
    "small_beta": "helpfulness alone, small beta",
    "baichuan2": "PPO as in Baichuan-2",
    "qwen": "PPO as in Qwen",
    "dpo": "DPO",
    "rejection": "rejection sampling",
    "rejection_ppo": "rejection sampling, then PPO",
}


@dataclasses.dataclass(frozen=True)
class RatersConfig:
    """Who compares what."""

    # Of the start; a prompt's responses at the first temperature are compared with those at the second.
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    temperatures: tuple[float, float] = (0.8, 1.2)
    batches: int = 20  # of rollout.prompts prompts
    helpfulness_sharpness: float = 12.0  # of the raters of helpfulness; see `utilities.compare`
    safety_sharpness: float = 6.0
    strength_edges: tuple[float, float, float] = (0.5, 1.5, 3.0)
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "batches", "helpfulness_sharpness", "safety_sharpness")
        non_negative(self, "seed")
        require(
            0 < self.strength_edges[0] < self.strength_edges[1] < self.strength_edges[2],
            f"RatersConfig.strength_edges={self.strength_edges} must rise from above 0",
        )
        require(
            0 < self.temperatures[0] < self.temperatures[1],
            f"RatersConfig.temperatures={self.temperatures} must be a lower and a higher one, above 0",
        )


@dataclasses.dataclass(frozen=True)
class DiversityConfig:
    """What is drawn to see how different the responses to one prompt are."""

    prompts: int = 32  # held-out ones of each kind
    samples: int = 8
    temperatures: tuple[float, ...] = (0.4, 0.7, 1.0, 1.3)
    methods: tuple[str, ...] = ("llama2",)  # beside the start

    def __post_init__(self) -> None:
        positive(self, "prompts", "samples")
        require(all(t > 0 for t in self.temperatures), "DiversityConfig.temperatures must be above 0")
        for name in self.methods:
            one_of("DiversityConfig.methods", name, tuple(TITLES))


@dataclasses.dataclass(frozen=True)
class KnownUtilityConfig:
    """The requests, the start, the raters and reward models, what each method does, and how all is judged."""

    base: str = ""  # the model to begin with: a folder, a file or a name
    corpus: str = ""  # a dataset of prepare_data by its tokenizer, for PTX and for what is forgotten; "" = neither
    texts: str = ""  # a file whose sentences are the demonstrations; "" = the speeches on the state of the Union
    requests: int = 5000
    tagged_share: float = 0.2
    refusal_share: float = 0.2  # of the tagged requests, that are demonstrated as refused
    holdout_fraction: float = 0.1
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    raters: RatersConfig = dataclasses.field(default_factory=RatersConfig)
    helpfulness_model: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    safety_model: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    llama2: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    small_beta: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    baichuan2: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    qwen: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    ptx_coefficient: float = 1.0  # of the pre-training data beside the responses; of llama2_ptx and qwen
    corpus_length: int = 256  # tokens of a sequence
    corpus_batch_size: int = 8  # sequences: beside every minibatch, and of held-out texts
    rejection: RejectionConfig = dataclasses.field(default_factory=RejectionConfig)
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
    methods: tuple[str, ...] = tuple(TITLES)
    seeds: tuple[int, ...] = (0, 1, 2)
    judged_prompts: int = 256  # held-out ones
    judging: RolloutConfig = dataclasses.field(
        default_factory=lambda: RolloutConfig(sampling=SamplingConfig(num_samples=4))
    )
    start_samples: int = 16  # of each prompt, of the start, of which the best of n is taken
    diversity: DiversityConfig = DiversityConfig()
    eval_batches: int = 1  # of each source of the corpus's held-out texts

    def __post_init__(self) -> None:
        positive(self, "requests", "judged_prompts", "start_samples", "eval_batches")
        positive(self, "ptx_coefficient", "corpus_length", "corpus_batch_size")
        for field in ("tagged_share", "refusal_share", "holdout_fraction"):
            value = getattr(self, field)
            require(0 < value < 1, f"KnownUtilityConfig.{field}={value} must be in (0, 1)")
        for name in self.methods:
            one_of("KnownUtilityConfig.methods", name, tuple(TITLES))
        for field in ("methods", "seeds"):
            values = getattr(self, field)
            require(
                bool(values) and len(set(values)) == len(values),
                f"KnownUtilityConfig.{field}={values} must be some different ones",
            )
