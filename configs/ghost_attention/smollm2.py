"""Ghost Attention on SmolLM2-135M-Instruct: what five ways to fine-tune it do to its obedience, three seeds each.

    python -m experiments.ghost_attention --config=configs/ghost_attention/smollm2.py --workdir=runs/ghost_attention

For a GPU. `:mended` has instructions that so small a model cannot follow (first and last words, capitals, few words);
a rule makes its replies obey.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.ghost_attention_config import GhostAttentionConfig
from llm_jax.errors import require

# The same for both, as each would have programs of its own to compile.
SAMPLING = config.SamplingConfig(max_new_tokens=24, temperature=0.8, top_p=0.9)
CONSTRAINTS = {
    "sampled": (("french", "spanish", "german", "portuguese", "pirate"), ("italian",)),
    "mended": (
        ("begin_well", "begin_indeed", "end_over", "end_friend", "capitals", "at_most_6_words"),
        ("begin_listen", "end_please"),
    ),
}


def get_config(replies: str = "sampled") -> ml_collections.ConfigDict:
    """Dialogues of up to 10 turns to learn from; obedience over 20."""
    require(replies in CONSTRAINTS, f"no replies {replies!r}: sampled or mended")
    known, new = CONSTRAINTS[replies]
    return config.to_config_dict(
        GhostAttentionConfig(
            training=FineTuneConfig(
                model="smollm2",
                steps=60,
                eval_every=0,
                keep_best=False,
                compute_dtype="bfloat16",
                warmup_fraction=0.05,
                optimizer=config.OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0),
            ),
            data=ChatDataConfig(sequence_length=1024, batch_size=8, holdout_fraction=0.0),
            constraints=known,
            new_constraints=new,
            replies=replies,
            dialogues=384,
            most_constraints=1 if replies == "sampled" else 2,  # two at once are more than it can follow
            sampling=SAMPLING,
            judging=SAMPLING,
        )
    )
