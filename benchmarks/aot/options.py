"""What the command lines of the attention benchmarks share."""

import argparse
from collections.abc import Iterable


def positive(text: str) -> int:
    """A number of an option that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def add_names(parser: argparse.ArgumentParser, flag: str, names: Iterable[str]) -> None:
    """An option that takes some of the names, all of them if it is not given."""
    known = list(names)
    metavar = flag.removeprefix("--").removesuffix("s").upper()
    parser.add_argument(flag, nargs="+", choices=known, default=known, metavar=metavar, help=", ".join(known))
