"""Make the page of a corpus run anew, or of one that was stopped: from what its stages wrote, and nothing else.

    python -m experiments.corpus_report --workdir=runs/data

Writes report.html and figures/*.png to --workdir, the folder of a run of experiments.prepare_data, which does the same
at its end.
"""

import dataclasses
from pathlib import Path

from experiments import runner
from llm_jax.evaluation import corpus_page


@dataclasses.dataclass(frozen=True)
class CorpusReportConfig:
    """Whose page is made."""

    run: str = ""  # the workdir of experiments.prepare_data; "" = --workdir, which may be another folder


def run(config: CorpusReportConfig, workdir: Path) -> None:
    """Write the page."""
    found = corpus_page.read(Path(config.run) if config.run else workdir)
    print(corpus_page.write(found, workdir))


if __name__ == "__main__":
    runner.main(run, CorpusReportConfig, "configs/corpus_report/default.py", workdir="runs/data", save_config=False)
