"""The demo on all public texts.

    python -m experiments.demo --config=configs/demo/default.py --workdir=runs/demo

About twelve minutes on two free cores, with 266 MB of downloads. Expect 2.3 bits per byte over all held-out text, where
the unigram model needs 3.4 and xz -9e 2.8.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The arguments of each stage."""
    return ml_collections.ConfigDict(
        {
            "train_tokenizer": ("--config=configs/tokenizer/demo.py",),
            "prepare_data": ("--config=configs/data/default.py",),
            "pretrain": ("--config=configs/demo/pretrain.py",),
            "generate": ("--config=configs/generate/demo.py",),
            "report": ("--config=configs/demo/report.py",),
        }
    )
