"""What a scaling study trains, where its trials run, and how its law is fitted."""

import dataclasses

from llm_jax.config import CorpusConfig, TokenizerConfig, TrainConfig, non_negative, one_of, positive
from llm_jax.errors import require

LAUNCHERS = ("inline", "processes", "slurm")
LEARNING_RATE_RULES = ("fixed", "sweep", "mup")
MIN_DRAWS = 40  # below, the ends of a 95 % interval are the most extreme draws


@dataclasses.dataclass(frozen=True)
class SizeConfig:
    """One size of the model; everything else of it comes from the study's base run. 0 = the base's value."""

    name: str = ""
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0  # 0 = num_heads
    head_dim: int = 0  # 0 = hidden_size / num_heads
    ffn_size: int = 0

    def __post_init__(self) -> None:
        non_negative(self, "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """The trials: every size with every budget of tokens or compute, every value of `vary`, and every seed."""

    sizes: tuple[SizeConfig, ...] = ()
    tokens: tuple[int, ...] = ()  # training tokens of a trial
    compute: tuple[float, ...] = ()  # training FLOPs of a trial; its tokens follow from the size
    tokens_per_parameter: tuple[float, ...] = ()  # of all parameters; a trial's tokens follow from the size
    least_tokens_per_parameter: float = 0.0  # trials with fewer are left out
    most_tokens_per_parameter: float = 0.0  # trials with more are left out; 0 = no limit
    vary: tuple[str, ...] = ()  # further config keys and their values: "optimizer.weight_decay=0.0,0.1"
    seeds: tuple[int, ...] = (0,)  # of initialisation and data
    seeds_up_to: float = 0.0  # FLOPs; trials of more compute take the first seed alone; 0 = no limit

    def __post_init__(self) -> None:
        non_negative(self, "least_tokens_per_parameter", "most_tokens_per_parameter", "seeds_up_to")
        for name in ("tokens", "compute", "tokens_per_parameter"):
            values = getattr(self, name)
            require(all(value > 0 for value in values), f"GridConfig.{name}={values} must be positive")
        require(bool(self.seeds), "GridConfig.seeds is empty: name one seed at least")


@dataclasses.dataclass(frozen=True)
class LearningRateConfig:
    """Which peak learning rate each size takes."""

    rule: str = "fixed"  # fixed: the base's; sweep: see `rates`; mup: the base's, at width `mup_base_width`
    rates: tuple[float, ...] = ()  # sweep: tried for each of `sizes`
    sizes: tuple[str, ...] = ()  # sweep: names of the sizes that try them; () = the whole grid. Others follow a line
    tokens_per_parameter: float = 20.0  # sweep: how long each try trains
    seeds: tuple[int, ...] = (0,)
    mup_base_width: int = 0  # mup: the hidden size at which the base's learning rate holds

    def __post_init__(self) -> None:
        one_of("LearningRateConfig.rule", self.rule, LEARNING_RATE_RULES)
        positive(self, "tokens_per_parameter")
        non_negative(self, "mup_base_width")
        require(bool(self.seeds), "LearningRateConfig.seeds is empty: name one seed at least")
        require(
            self.rule != "sweep" or len(self.rates) >= 3,
            f"LearningRateConfig.rates={self.rates}: a sweep needs at least 3 to enclose the best one",
        )
        require(
            self.rule != "mup" or self.mup_base_width > 0,
            "LearningRateConfig.mup_base_width: set it to the hidden size whose learning rate is known",
        )


@dataclasses.dataclass(frozen=True)
class LauncherConfig:
    """Where trials run: in this process, in processes beside it, or as a Slurm job array."""

    kind: str = "inline"
    together: int = 16  # at most so many trials of one shape in one compiled step; 1 = every trial alone
    together_up_to: float = 0.0  # FLOPs of a trial; larger ones run alone; 0 = no limit
    parallel: int = 2  # jobs at the same time, of processes and slurm
    retries: int = 1  # of a failed job; not of a trial that diverged
    timeout_minutes: int = 7 * 24 * 60
    # Slurm only; "" and 0 = the cluster's default.
    partition: str = ""
    account: str = ""
    constraint: str = ""
    nodes: int = 1
    tasks_per_node: int = 1  # JAX processes on a node: 1 drives all of its GPUs or TPU chips
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    memory_gigabytes: int = 0
    setup: tuple[str, ...] = ()  # shell lines before the job, such as "module load cuda"
    options: tuple[str, ...] = ()  # further #SBATCH options: "qos=high", "gres=tpu:4"

    def __post_init__(self) -> None:
        one_of("LauncherConfig.kind", self.kind, LAUNCHERS)
        positive(self, "together", "parallel", "timeout_minutes", "nodes", "tasks_per_node", "cpus_per_task")
        non_negative(self, "together_up_to", "retries", "gpus_per_node", "memory_gigabytes")
        require(
            all("=" in option for option in self.options),
            f"LauncherConfig.options={self.options}: write each as NAME=VALUE",
        )


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How the law is fitted and how sure of it we are."""

    draws: int = 1000  # of the bootstrap over trials and seeds
    seed: int = 0
    confidence: float = 0.95
    huber_delta: float = 1e-3  # of the robust fit, on differences of log losses (Hoffmann et al. 2022, section 3.3)

    def __post_init__(self) -> None:
        positive(self, "huber_delta")
        require(
            self.draws >= MIN_DRAWS,
            f"FitConfig.draws={self.draws} are too few for an interval: draw {MIN_DRAWS} or more",
        )
        require(0 < self.confidence < 1, f"FitConfig.confidence={self.confidence} must be in (0, 1)")


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """The larger run whose loss is predicted from the others, and then trained."""

    compute: float = 0.0  # FLOPs; 0 = predict nothing
    size: SizeConfig = SizeConfig()
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        non_negative(self, "compute")
        require(bool(self.seeds), "PredictionConfig.seeds is empty: name one seed at least")


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """A whole study: data, sweep, fit and prediction."""

    base: TrainConfig = dataclasses.field(default_factory=TrainConfig)  # what all trials share
    warmup_fraction: float = 0.0  # of a trial's steps; 0 = the base's warmup_steps
    curve_points: int = 8  # evaluations of a trial on held-out text, its end included
    grid: GridConfig = GridConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()
    launcher: LauncherConfig = LauncherConfig()
    fit: FitConfig = FitConfig()
    prediction: PredictionConfig = PredictionConfig()
    results: str = ""  # a results.json of an earlier study to fit instead of training
    # Without base.data.dataset, one is made of this corpus, with a tokenizer trained on it.
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        positive(self, "curve_points")
        require(
            0 <= self.warmup_fraction < 1, f"ScalingConfig.warmup_fraction={self.warmup_fraction} must be in [0, 1)"
        )
