"""Ghost Attention on a small base model on two cores: replies that a rule makes obey, dialogues of a few turns.

    python -m experiments.ghost_attention --config=configs/ghost_attention/small.py \\
        --workdir=runs/ghost_attention_small --config.training.model=runs/demo/model --config.data.template=llama2

A base model has to learn to obey at all first: --config.training.model=runs/sft/best, a chat model, obeys sooner.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.ghost_attention_config import GhostAttentionConfig


def get_config() -> ml_collections.ConfigDict:
    """Dialogues of up to 4 turns to learn from; obedience over 10."""
    return config.to_config_dict(
        GhostAttentionConfig(
            training=FineTuneConfig(
                steps=200,
                eval_every=0,
                keep_best=False,
                max_length=1024,
                warmup_fraction=0.05,
                optimizer=config.OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0),
            ),
            data=ChatDataConfig(sequence_length=256, batch_size=8, holdout_fraction=0.0),
            constraints=("begin_well", "begin_indeed", "end_over", "end_friend"),
            new_constraints=(),
            replies="mended",
            dialogues=512,
            turns=4,
            judged_turns=(1, 2, 4, 6, 10),
            judged_dialogues=16,
            batch_size=32,
            sampling=config.SamplingConfig(max_new_tokens=8, temperature=0.7),
            judging=config.SamplingConfig(max_new_tokens=12, temperature=0.0),
        )
    )
