"""Samples of the demo's model, in each language of its corpus.

    python -m experiments.generate --config=configs/generate/demo.py --workdir=runs/demo/model

Some seconds on 2 cores. Expect words and local grammar; a model of this size, after minutes of training, does not
keep to a subject.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Moderate sampling from the beginnings of a speech, a statute, a novel, a function and a Cantonese sentence."""
    return ml_collections.ConfigDict(
        {
            "max_new_tokens": 96,
            "temperature": 0.8,
            "top_p": 0.95,
            "repetition_penalty": 1.1,
            "prompts": (
                "The Congress of the United States",
                "And it came to pass",
                "第一条 为了",
                "却说曹操",
                "我今日",
                "def main(",
            ),
        }
    )
