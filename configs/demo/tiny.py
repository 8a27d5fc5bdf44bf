"""The demo in about a minute on the smallest corpus (5 MB of downloads): to see that everything works, not for quality.

python -m experiments.demo --config=configs/demo/tiny.py --workdir=runs/demo_tiny
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default demo's stages with a smaller corpus, vocabulary and run."""
    return ml_collections.ConfigDict(
        {
            "train_tokenizer": (
                "--config=configs/tokenizer/demo.py",
                "--config.corpus.profile=tiny",
                "--config.vocab_size=4096",
                "--config.sample_bytes=2000000",
            ),
            "prepare_data": ("--config=configs/data/tiny.py",),
            "pretrain": ("--config=configs/demo/pretrain.py:tiny",),
            "generate": ("--config=configs/generate/demo.py", "--config.max_new_tokens=16"),
            "report": ("--config=configs/demo/report.py",),
        }
    )
