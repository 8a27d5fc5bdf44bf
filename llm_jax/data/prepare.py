"""What `experiments.prepare_data` is told: the corpus, the stages it goes through in their order, and who runs them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from llm_jax.config import CorpusConfig, non_negative, one_of
from llm_jax.data.stages import Stage
from llm_jax.data.stages.contamination import Contamination, ContaminationConfig
from llm_jax.data.stages.exact import Exact, ExactConfig
from llm_jax.data.stages.extract import Extract, ExtractConfig
from llm_jax.data.stages.fuzzy import Fuzzy, FuzzyConfig
from llm_jax.data.stages.heuristics import Heuristics, HeuristicsConfig
from llm_jax.data.stages.instructions import Instructions, InstructionsConfig
from llm_jax.data.stages.language import Language, LanguageConfig
from llm_jax.data.stages.lines import Lines, LinesConfig
from llm_jax.data.stages.mixture import Mixture, MixtureConfig
from llm_jax.data.stages.perplexity import Scorer
from llm_jax.data.stages.personal import Personal, PersonalConfig
from llm_jax.data.stages.quality import Quality, QualityConfig
from llm_jax.data.stages.semantic import Semantic, SemanticConfig
from llm_jax.errors import require

RUNNERS = ("native", "ray")
COMPRESSIONS = ("none", "zstd")
# Numbers the stages' folders, so that one keeps its name when another is turned off.
ORDER = (
    "read",
    "extract",
    "language",
    "exact",
    "heuristics",
    "quality",
    "lines",
    "fuzzy",
    "semantic",
    "instructions",
    "personal",
    "contamination",
    "mixture",
)


@dataclasses.dataclass(frozen=True)
class PrepareConfig(CorpusConfig):
    """A corpus, and what is made of it; one field for each stage's settings."""

    runner: str = "native"  # this process's threads, or ray: a cluster
    ray_address: str = ""  # of a Ray cluster that is there; "" = one on this machine, for as long as the run
    seed: int = 0  # which dropped documents are shown
    audit: int = 5  # how many of them for each reason
    keep_stages: bool = True  # their documents stay, so that another setting redoes only what follows it
    compression: str = "none"  # of the stages' documents; zstd takes two fifths of the space and more time
    extract: ExtractConfig = dataclasses.field(default_factory=ExtractConfig)
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    exact: ExactConfig = dataclasses.field(default_factory=ExactConfig)
    heuristics: HeuristicsConfig = dataclasses.field(default_factory=HeuristicsConfig)
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    lines: LinesConfig = dataclasses.field(default_factory=LinesConfig)
    fuzzy: FuzzyConfig = dataclasses.field(default_factory=FuzzyConfig)
    semantic: SemanticConfig = dataclasses.field(default_factory=SemanticConfig)
    instructions: InstructionsConfig = dataclasses.field(default_factory=InstructionsConfig)
    personal: PersonalConfig = dataclasses.field(default_factory=PersonalConfig)
    contamination: ContaminationConfig = dataclasses.field(default_factory=ContaminationConfig)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("PrepareConfig.runner", self.runner, RUNNERS)
        one_of("PrepareConfig.compression", self.compression, COMPRESSIONS)
        non_negative(self, "seed", "audit")
        require(self.runner == "ray" or not self.ray_address, "PrepareConfig.ray_address needs runner=ray")


def stages(config: PrepareConfig, scorer: Scorer) -> list[Stage]:
    """The stages that are not turned off, in their order; reading comes before them.

    `scorer` loads a model that `config.quality` may name.
    """
    every: list[tuple[Any, Callable[[Any], Stage]]] = [
        (config.extract, Extract),
        (config.language, Language),
        (config.exact, Exact),
        (config.heuristics, Heuristics),
        (config.quality, partial(Quality, scorer=scorer)),
        (config.lines, Lines),
        (config.fuzzy, Fuzzy),
        (config.semantic, Semantic),
        (config.instructions, Instructions),
        (config.personal, Personal),
        (config.contamination, Contamination),
        (config.mixture, Mixture),
    ]
    return [stage(settings) for settings, stage in every if settings.enabled]
