"""The report of the demo's run.

python -m experiments.report --config=configs/demo/report.py --workdir=runs/demo --config.run=runs/demo/model
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """A title, the run's folder and, where there are any, the file of samples."""
    return ml_collections.ConfigDict(
        {"title": "llm_jax demo: a small language model from text to samples", "run": "runs/demo/model", "samples": ""}
    )
