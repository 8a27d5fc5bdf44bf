"""The settings of an experiment with Ghost Attention."""

import dataclasses

from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.constraints import CONSTRAINTS
from llm_jax.alignment.ghost_attention import VARIANTS
from llm_jax.config import SamplingConfig, one_of, positive
from llm_jax.errors import require

REPLIES = ("sampled", "mended")


@dataclasses.dataclass(frozen=True)
class GhostAttentionConfig:
    """Which dialogues are built, what is trained on them, and how obedience is measured."""

    training: FineTuneConfig = dataclasses.field(  # of each variant; its model is also the one that is sampled
        default_factory=lambda: FineTuneConfig(eval_every=0, keep_best=False)
    )
    data: ChatDataConfig = dataclasses.field(  # template, sequence_length, batch_size, packed
        default_factory=lambda: ChatDataConfig(holdout_fraction=0.0)
    )
    questions: str = ""  # a file or folder of conversations whose users' messages are asked; "" = made ones
    holdout_fraction: float = 0.25  # of the questions, by subject or conversation
    constraints: tuple[str, ...] = ("french", "spanish", "german", "portuguese", "pirate")
    new_constraints: tuple[str, ...] = ("italian",)  # only judged; () = none
    most_constraints: int = 2  # of one instruction
    # mended: what disobeys is changed by rule until it obeys. Ours, for models that cannot do what they are told.
    replies: str = "sampled"
    dialogues: int = 512  # to train on
    turns: int = 10  # of the longest of them
    rounds: int = 4  # of sampling at most, to get them
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)  # of the training and of what is judged
    judged_turns: tuple[int, ...] = (2, 4, 6, 10, 20)
    judged_dialogues: int = 32  # of each kind of instruction, for each seed
    mapped_dialogues: int = 8  # whose attention is drawn; 0 = none
    batch_size: int = 64  # dialogues that are sampled at once
    sampling: SamplingConfig = dataclasses.field(  # of what is trained on
        default_factory=lambda: SamplingConfig(max_new_tokens=24, temperature=0.7, top_p=0.9)
    )
    judging: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(max_new_tokens=24, temperature=0.0)
    )

    def __post_init__(self) -> None:
        positive(self, "dialogues", "turns", "rounds", "most_constraints", "judged_dialogues", "batch_size")
        require(self.mapped_dialogues >= 0, "GhostAttentionConfig.mapped_dialogues must not be negative")
        require(0 < self.holdout_fraction < 1, "GhostAttentionConfig.holdout_fraction must be in (0, 1)")
        one_of("GhostAttentionConfig.replies", self.replies, REPLIES)
        for field, known in (("constraints", CONSTRAINTS), ("new_constraints", CONSTRAINTS), ("variants", VARIANTS)):
            for name in getattr(self, field):
                one_of(f"GhostAttentionConfig.{field}", name, tuple(known))
        for field in ("constraints", "variants", "seeds", "judged_turns"):
            values = getattr(self, field)
            require(
                bool(values) and len(set(values)) == len(values),
                f"GhostAttentionConfig.{field}={values} must name at least one, and none of them twice",
            )
        require(min(self.seeds) >= 0, f"GhostAttentionConfig.seeds={self.seeds} must not be negative")
        both = set(self.constraints) & set(self.new_constraints)
        require(not both, f"GhostAttentionConfig: {', '.join(both)} cannot be both trained on and new")
        require(min(self.judged_turns) > 0, f"GhostAttentionConfig.judged_turns={self.judged_turns} count from 1")
        require(
            self.data.path == "" and self.data.holdout_fraction == 0,
            "GhostAttentionConfig.data.path and holdout_fraction are not used: the dialogues are built, and all are "
            "trained on; leave them at '' and 0",
        )
        unmended = [name for name in self.constraints if CONSTRAINTS[name].mend is None]
        require(
            self.replies != "mended" or not unmended,
            f"GhostAttentionConfig.replies='mended': no rule makes a reply {', '.join(unmended)}; leave these out of "
            "constraints",
        )
