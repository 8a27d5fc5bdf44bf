"""Deduplication beside datatrove, datasketch and rensa: megabytes of text in a second.

    python -m benchmarks.deduplication --peers_python=PATH [--rounds=3] [--megabytes=4]

- exact, lines, exact_fuzzy: our stages, on the whole default corpus, from Parquet to Parquet.
- rensa (with our n-grams), rensa_split, lines_set (a Python set of the lines' hashes): on the whole corpus too.
- datasketch, datatrove (with spaCy's words), datatrove_split: on a sample of --megabytes.

All find near-duplicates by five-word shingles and 112 permutations in 14 bands of 8 rows. In Chinese, ours and rensa's
words are characters; for datasketch and those named `split`, words are what is between spaces, so that a Chinese
sentence is one and costs next to nothing. Only ours compares the n-grams of what it finds, writes what it keeps, and
finds exact duplicates first. The others run in one process, ours on all cores: `processor_speed_over_...` compares the
processor's time for a megabyte, `speed_over_...` the clock's. The implementations take turns; ratios are medians of
those within a round. Prints one JSON line for each. `busy_elsewhere` is the share of the machine that other programs
took meanwhile.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.peers.turns import Peer, summary, take_turns
from llm_jax.config import CorpusConfig
from llm_jax.data import reading

OURS = ("exact_fuzzy", "exact", "lines")
ON_ALL = ("rensa", "rensa_split", "lines_set")
ON_SAMPLE = ("datasketch", "datatrove_split", "datatrove")


def write_corpus(path: Path) -> None:
    """All raw documents of the default profile, duplicates included."""
    with tempfile.TemporaryDirectory() as folder:
        reading.read(CorpusConfig(), Path(folder))
        pq.write_table(pq.read_table(folder), path, row_group_size=4096)


def write_sample(corpus: Path, path: Path, megabytes: float) -> None:
    """Documents in the order of their ids' hashes, until they are so large."""
    table = pq.read_table(corpus)
    order = sorted(range(len(table)), key=lambda i: hashlib.blake2b(table["id"][i].as_py().encode()).digest())
    chosen, size = [], 0.0
    for place in order:
        chosen.append(place)
        size += len(table["text"][place].as_py().encode()) / 1e6
        if size >= megabytes:
            break
    pq.write_table(table.take(chosen), path)


def megabytes_of(path: Path) -> float:
    """Of text."""
    return sum(len(text.encode()) for text in pq.read_table(path)["text"].to_pylist()) / 1e6


def report(peer: Peer, peers: Mapping[str, Peer], megabytes: Mapping[str, float]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "deduplication", "implementation": peer.name}
    if peer.problem:
        return line | {"skipped": peer.problem}
    size = megabytes[peer.name]
    line |= {"megabytes": round(size, 1), "mb_per_second": round(size / peer.median("seconds"), 2)}
    line |= {**summary(peer), "found": int(peer.about["first_loss"])}
    if peer.name != "exact_fuzzy":
        return line
    for other in (*ON_ALL, *ON_SAMPLE):
        if other in peers and not peers[other].problem:
            for name, key in (("speed_over", "seconds"), ("processor_speed_over", "processor_seconds")):
                pairs = zip(peer.rounds, peers[other].rounds, strict=True)
                ratios = [theirs[key] / megabytes[other] / (mine[key] / size) for mine, theirs in pairs]
                line[f"{name}_{other}"] = round(statistics.median(ratios), 2)
    return line


def main(arguments: list[str]) -> None:
    """Measure all implementations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default=",".join((*OURS, *ON_ALL, *ON_SAMPLE)), help="of them")
    parser.add_argument("--peers_python", default=sys.executable, help="an interpreter that has the other libraries")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=4, help="of text in the sample")
    parser.add_argument("--workdir", default="runs/benchmark_deduplication", help="for the corpus and the sample")
    options = parser.parse_args(arguments)
    workdir = Path(options.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    corpus, sample = workdir / "corpus.parquet", workdir / "sample.parquet"
    if not corpus.is_file():
        write_corpus(corpus)
    write_sample(corpus, sample, options.megabytes)
    sizes = {path: megabytes_of(path) for path in (corpus, sample)}
    peers, megabytes = {}, {}
    for name in options.implementations.split(","):
        path = sample if name in ON_SAMPLE else corpus
        module, python = ("ours", sys.executable) if name in OURS else ("their", options.peers_python)
        peers[name] = Peer(name, f"{module}_deduplication", (name, str(path)), python)
        megabytes[name] = sizes[path]
    take_turns(peers.values(), options.rounds, 1)
    for peer in peers.values():
        print(json.dumps(report(peer, peers, megabytes)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
