"""What alignment reads and how, and how a trained model is trained further."""

import dataclasses
from collections.abc import Mapping

from llm_jax.config import (
    QUANTIZATIONS,
    CheckpointConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    non_negative,
    one_of,
    positive,
)
from llm_jax.errors import require
from llm_jax.tokenization.chat import TEMPLATES

CHAT_FORMATS = ("auto", "messages", "sharegpt", "alpaca", "hh_rlhf")
SUPERVISE = ("replies", "last", "qwen_released")
TOO_LONG = ("cut", "drop", "truncate")
POOLINGS = ("end", "last")
DPO_LOSSES = ("sigmoid", "ipo", "normalised")
# LLaMA-2, table 27: the margin of each strength, from 1 (negligibly better, or unsure) to 4 (significantly better).
MARGINS = {"none": (0.0,) * 5, "small": (0.0, 1 / 3, 2 / 3, 1.0), "large": (0.0, 1.0, 2.0, 3.0)}


@dataclasses.dataclass(frozen=True)
class ChatDataConfig:
    """Which conversations a run of supervised fine-tuning reads, what it learns of them, and how they fill batches."""

    path: str = ""  # a file or folder of .jsonl, .jsonl.gz or .json
    format: str = "auto"  # of the records; auto = each record's own
    template: str = "auto"  # llama2, baichuan2, chatml, file; auto = the model's own, else chatml if it fits
    # replies: every reply and the token that ends it. last: only a conversation's last one. qwen_released (chatml): as
    # in Qwen's published code, the marks around every message and the line break after it too.
    supervise: str = "replies"
    # Of a conversation longer than a sequence. cut: the last rounds go. drop: all of it. truncate: what is too much, in
    # the midst of a reply if need be.
    too_long: str = "cut"
    holdout_fraction: float = 0.01  # of the conversations, chosen by a hash of their first message; 0 = none
    heldout_path: str = ""  # conversations to hold out instead: a file or folder as `path` is
    sequence_length: int = 2048
    batch_size: int = 64  # sequences in a global batch
    packed: bool = True  # several conversations in a sequence; False = one, and padding
    seed: int = 0
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # source -> weight; {} = each sample equally
    prefetch: int = 8  # batches prepared ahead in the background

    def __post_init__(self) -> None:
        positive(self, "sequence_length", "batch_size", "prefetch")
        one_of("ChatDataConfig.format", self.format, CHAT_FORMATS)
        one_of("ChatDataConfig.template", self.template, TEMPLATES)
        one_of("ChatDataConfig.supervise", self.supervise, SUPERVISE)
        one_of("ChatDataConfig.too_long", self.too_long, TOO_LONG)
        require(
            0 <= self.holdout_fraction < 1, f"ChatDataConfig.holdout_fraction={self.holdout_fraction} must be in [0, 1)"
        )
        require(all(w >= 0 for w in self.weights.values()), "ChatDataConfig.weights must not be negative")
        require(not self.weights or sum(self.weights.values()) > 0, "ChatDataConfig.weights are all zero")


@dataclasses.dataclass(frozen=True)
class PairDataConfig:
    """How pairs of responses fill batches."""

    sequence_length: int = 2048  # holds both responses of a pair, each with its prompt
    batch_size: int = 16  # sequences in a global batch; several pairs share one
    packed: bool = True  # several pairs in a sequence; False = one, and padding
    seed: int = 0
    # Source -> its share of the pairs. An epoch then is as many pairs as there are without using one twice. {} = all.
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: int = 0  # training pairs, drawn by `seed`: how much more of them are worth; 0 = all

    def __post_init__(self) -> None:
        name = type(self).__name__
        positive(self, "sequence_length", "batch_size")
        non_negative(self, "limit")
        require(all(w >= 0 for w in self.weights.values()), f"{name}.weights must not be negative")
        require(not self.weights or sum(self.weights.values()) > 0, f"{name}.weights are all zero")


@dataclasses.dataclass(frozen=True)
class RewardDataConfig(PairDataConfig):
    """How pairs of responses fill the batches of a reward model."""

    # The token whose hidden state is scored. end (Qwen, section 3.2.1): the one that ends a reply, which is put there
    # if the template has none. last: the last of the response itself, with nothing after it.
    pooling: str = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("RewardDataConfig.pooling", self.pooling, POOLINGS)


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """What a reward model minimises."""

    margin: str = "none"  # by which a stronger preference must show more: none, small, large (LLaMA-2, table 27)
    safety_coefficient: float = 0.0  # of the loss on responses labelled safe or unsafe; 0 = none

    def __post_init__(self) -> None:
        one_of("RewardLossConfig.margin", self.margin, tuple(MARGINS))
        non_negative(self, "safety_coefficient")

    @property
    def margins(self) -> tuple[float, ...]:
        """The margin of strength 1, 2, ...: of as many as a pair may have."""
        return MARGINS[self.margin]


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """How a trained model is trained further; a preset of a report changes some of these."""

    model: str = ""  # a run folder, a Hugging Face folder, a .gguf file or a released model's name
    steps: int = 0  # 0 = as many as `epochs` take
    epochs: float = 1.0
    seed: int = 0
    microbatches: int = 1
    log_every: int = 10
    eval_every: int = 100  # 0 = only at the end
    keep_best: bool = True  # also keep the model of the lowest held-out loss, in WORKDIR/best
    # Of the model; see ModelConfig.
    max_length: int = 0  # 0 = the model's
    dropout_rate: float = 0.0
    neftune_alpha: float = 0.0
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    loss: LossConfig = dataclasses.field(default_factory=lambda: LossConfig(only_weighted=True))
    warmup_fraction: float = 0.0  # of the steps; 0 = optimizer.warmup_steps, which is the least otherwise
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5, warmup_steps=0)
    )
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    quantize: str = "none"  # of the frozen model beside adapters: int8 or int4 is QLoRA
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(
        default_factory=lambda: CheckpointConfig(every_steps=500, keep_last=1)
    )

    def __post_init__(self) -> None:
        positive(self, "epochs", "microbatches", "log_every")
        non_negative(self, "steps", "seed", "eval_every", "max_length")
        require(
            0 <= self.warmup_fraction < 1, f"FineTuneConfig.warmup_fraction={self.warmup_fraction} must be in [0, 1)"
        )
        one_of("FineTuneConfig.quantize", self.quantize, QUANTIZATIONS)
        require(
            self.quantize == "none" or self.lora.rank > 0,
            f"FineTuneConfig.quantize={self.quantize!r}: quantised weights cannot be trained; set lora.rank to train "
            "adapters beside them",
        )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Which pairs of responses are read, which ones ratings make, and how strong their preferences are."""

    path: str = ""  # a .jsonl, .jsonl.gz or .json file, or a folder of them
    ignored_fields: tuple[str, ...] = ()  # of the records, beside those that are known
    categories: tuple[str, ...] = ()  # pairs of which are kept; of rated texts they are the domains. () = all
    # What each step of the records' own scale counts as: () = itself; (1, 2, 2, 3, 4) makes four of five.
    strength_scale: tuple[int, ...] = ()
    rating_range: tuple[float, float] = (-4.0, 4.0)  # ratings outside of it are mistakes
    minimum_gap: float = 2.0  # between the ratings of a pair's responses
    strength_gaps: tuple[float, ...] = (3.0, 4.0, 5.0)  # the gaps from which on a preference is one step stronger
    label_strength: int = 3  # ours: of a text that is labelled good over one that is labelled bad, which have no gap
    pairs_per_text: int = 1  # how often a rated text may appear in pairs
    # How many of the people who rated a text judge it in training pairs, drawn by `seed`: a few of many are cheap and
    # often wrong. Held-out pairs are always judged by all. 0 = all.
    raters: int = 0
    # Ours: rated texts whose mean is this or lower are labelled unsafe, all others safe, as a stand-in for labels that
    # nobody gave them. 0 = no labels.
    unsafe_rating: float = 0.0
    holdout_fraction: float = 0.1  # of the prompts, chosen by hash; of texts without a prompt, of the texts
    seed: int = 0  # of which rated texts meet

    def __post_init__(self) -> None:
        positive(self, "minimum_gap", "pairs_per_text")
        non_negative(self, "raters")
        require(self.unsafe_rating <= 0, f"PreferenceConfig.unsafe_rating={self.unsafe_rating} must not be positive")
        low, high = self.rating_range
        require(
            low < high, f"PreferenceConfig.rating_range={self.rating_range} must be from a lower to a higher rating"
        )
        edges = self.strength_gaps
        rising = all(a < b for a, b in zip((0.0, *edges), edges))
        require(
            rising and len(edges) <= 4, f"PreferenceConfig.strength_gaps={edges} must be at most 4 gaps, each larger"
        )
        for field in ("strength_scale", "label_strength"):
            value = getattr(self, field)
            steps = value if isinstance(value, tuple) else (value,)
            require(all(1 <= step <= 5 for step in steps), f"PreferenceConfig.{field}={value} must be from 1 to 5")
        require(
            0 <= self.holdout_fraction < 1,
            f"PreferenceConfig.holdout_fraction={self.holdout_fraction} must be in [0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """A run of supervised fine-tuning."""

    training: FineTuneConfig = FineTuneConfig()
    data: ChatDataConfig = dataclasses.field(default_factory=ChatDataConfig)
    # Pre-training data mixed in: this share of the sequences of every batch, from a dataset of prepare_data.
    pretraining_dataset: str = ""
    pretraining_fraction: float = 0.0
    eval_batches: int = 16  # of each source's held-out conversations
    samples: int = 2  # held-out conversations whose last reply is written anew at every evaluation
    sampling: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=0.0)
    )

    def __post_init__(self) -> None:
        positive(self, "eval_batches")
        non_negative(self, "samples")
        require(
            0 <= self.pretraining_fraction < 1,
            f"SftConfig.pretraining_fraction={self.pretraining_fraction} must be in [0, 1)",
        )
        require(
            (self.pretraining_fraction > 0) == bool(self.pretraining_dataset),
            "SftConfig.pretraining_dataset and pretraining_fraction go together: set both, or neither",
        )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A run that trains a reward model."""

    training: FineTuneConfig = dataclasses.field(
        default_factory=lambda: FineTuneConfig(
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=5, final_fraction=0.1), warmup_fraction=0.03
        )
    )
    ratings: tuple[str, ...] = ()  # pairs of texts that people rated, by language (en, zh), instead of preferences.path
    preferences: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    template: str = "auto"  # of prompt and response, as ChatDataConfig's; none = plain texts
    data: RewardDataConfig = dataclasses.field(default_factory=RewardDataConfig)
    loss: RewardLossConfig = dataclasses.field(default_factory=RewardLossConfig)
    reference_responses: int = 512  # of the training pairs, over which the rewards' mean becomes 0

    def __post_init__(self) -> None:
        positive(self, "reference_responses")
        _check_pairs(self)


@dataclasses.dataclass(frozen=True)
class DpoLossConfig:
    """What direct preference optimisation minimises; see `losses.preference.dpo_loss`."""

    kind: str = "sigmoid"  # sigmoid (Rafailov et al., 2023), ipo (Azar et al., 2023) or normalised by length
    beta: float = 0.1  # how much the reference holds; with `normalised`, a larger one: it weighs a mean token
    label_smoothing: float = 0.0  # the probability that a preference is the wrong way round

    def __post_init__(self) -> None:
        one_of("DpoLossConfig.kind", self.kind, DPO_LOSSES)
        positive(self, "beta")
        require(
            0 <= self.label_smoothing < 0.5,
            f"DpoLossConfig.label_smoothing={self.label_smoothing} must be in [0, 0.5)",
        )


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """A run of direct preference optimisation. The reference is the model as it begins."""

    training: FineTuneConfig = dataclasses.field(
        default_factory=lambda: FineTuneConfig(
            optimizer=OptimizerConfig(learning_rate=5e-7, warmup_steps=5, final_fraction=0.1), warmup_fraction=0.1
        )
    )
    ratings: tuple[str, ...] = ()  # pairs of texts that people rated, by language (en, zh), instead of preferences.path
    preferences: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    template: str = "auto"  # of prompt and response, as ChatDataConfig's; none = plain texts
    data: PairDataConfig = dataclasses.field(default_factory=PairDataConfig)
    loss: DpoLossConfig = DpoLossConfig()
    samples: int = 2  # held-out prompts that are answered anew at every evaluation
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(max_new_tokens=64))

    def __post_init__(self) -> None:
        non_negative(self, "samples")
        _check_pairs(self)
        require(
            self.training.dropout_rate == self.training.neftune_alpha == 0,
            "DpoConfig.training: dropout_rate and neftune_alpha must be 0, as policy and reference are compared token "
            "by token",
        )


def _check_pairs(config: RewardConfig | DpoConfig) -> None:
    """Raise `UserError` for pairs out of nowhere or of two places, or a template that is none."""
    name = type(config).__name__
    one_of(f"{name}.template", config.template, ("none", *TEMPLATES))
    for language in config.ratings:
        one_of(f"{name}.ratings", language, ("en", "zh"))
    require(
        not (config.ratings and config.preferences.path),
        f"{name}.ratings and preferences.path are two sources of pairs: set one",
    )


@dataclasses.dataclass(frozen=True)
class InstructionsConfig:
    """Which conversations are made out of packages; see `alignment.instructions` and `alignment.ratings`."""

    exercises: tuple[str, ...] = ("skills", "statutes", "idioms", "functions")
    limit: int = 2000  # of each source of exercises and of reviews; 0 = all
    small_talk: tuple[str, ...] = ("en", "zh")
    reviews: tuple[str, ...] = ()  # languages ("en", "zh") of reviews to be continued
    holdout_fraction: float = 0.1
    cache: str = ""  # where downloads are kept; "" = the user's cache folder

    def __post_init__(self) -> None:
        non_negative(self, "limit")
        require(
            0 < self.holdout_fraction < 1,
            f"InstructionsConfig.holdout_fraction={self.holdout_fraction} must be in (0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class ExercisesConfig:
    """Which exercises a model answers, and how."""

    model: str = ""  # a run folder, a Hugging Face folder, a .gguf file or a released model's name
    path: str = ""  # the exercises, as experiments.prepare_instructions and experiments.self_instruct write them
    template: str = "auto"  # see ChatDataConfig
    limit: int = 0  # how many are asked; 0 = all
    batch_size: int = 16  # answered at once
    sampling: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=0.0)
    )

    def __post_init__(self) -> None:
        positive(self, "batch_size")
        non_negative(self, "limit")
        one_of("ExercisesConfig.template", self.template, TEMPLATES)


@dataclasses.dataclass(frozen=True)
class SelfInstructConfig:
    """Which samples of using tools a model writes."""

    model: str = ""  # a run folder, a Hugging Face folder, a .gguf file or a released model's name
    tools: str = ""  # a .jsonl file: a tool a line
    seeds: str = ""  # a .jsonl file: a sample a line, written by people
    count: int = 200  # samples that are asked for; may be raised when a run is continued
    shown: int = 3  # seed samples that the model sees before it writes one
    batch_size: int = 16  # written at once
    holdout_fraction: float = 0.1  # of the samples kept, chosen by a hash of their question
    quantize: str = "none"  # of the model: int8 or int4
    seed: int = 0
    sampling: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(max_new_tokens=128, temperature=0.7, top_p=0.95)
    )

    def __post_init__(self) -> None:
        positive(self, "count", "shown", "batch_size")
        non_negative(self, "seed")
        one_of("SelfInstructConfig.quantize", self.quantize, QUANTIZATIONS)
        require(
            0 <= self.holdout_fraction < 1,
            f"SelfInstructConfig.holdout_fraction={self.holdout_fraction} must be in [0, 1)",
        )
        require(self.sampling.num_samples == 1, "SelfInstructConfig.sampling.num_samples must be 1: raise count")
