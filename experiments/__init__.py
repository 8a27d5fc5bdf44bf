"""One module per experiment: python -m experiments.NAME --config=configs/... --workdir=..."""
