"""The page of the run whose folder is --workdir.

python -m experiments.corpus_report --config=configs/corpus_report/default.py --workdir=runs/data
"""

import ml_collections

from experiments.corpus_report import CorpusReportConfig
from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Read and write in the same folder."""
    return config.to_config_dict(CorpusReportConfig())
