"""Trials trained one group after the other in this process, as a sweep's inline launcher does."""

import json
import sys

from experiments import trials


def main(groups: str) -> None:
    """Train the runs of config files, given as a JSON list of the groups that train in one compiled step."""
    for config_paths in json.loads(groups):
        trials.execute(config_paths)


if __name__ == "__main__":
    main(sys.argv[1])
