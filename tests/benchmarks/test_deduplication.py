"""The benchmark of deduplication: what is measured finds what is planted, and the ratios."""

import random
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq

from benchmarks import deduplication
from benchmarks.peers import ours_deduplication, their_deduplication
from tests.data.stages import planted


def corpus(folder):
    """Ten texts, one of them three times, and another with a word changed."""
    generator = random.Random(0)
    texts = [planted.words(100, generator) for _ in range(10)]
    rows = [*texts, texts[0], [word.upper() for word in texts[0]], [*texts[1][:99], "changed"]]
    path = folder / "corpus.parquet"
    pq.write_table(planted.documents([" ".join(row) for row in rows]).to_arrow(), path)
    return path


def test_ours_finds_exact_and_fuzzy_duplicates(tmp_path):
    path = corpus(tmp_path)
    found = {name: ours_deduplication.deduplicate(stages, path) for name, stages in ours_deduplication.STAGES.items()}
    assert found == {"exact": 2.0, "exact_fuzzy": 3.0, "lines": 0.0}


def test_ours_has_the_bands_that_are_said():
    fuzzy = ours_deduplication.STAGES["exact_fuzzy"][1]
    bands = their_deduplication.BANDS
    assert fuzzy.bands_and_rows() == (bands, their_deduplication.PERMUTATIONS // bands)
    assert fuzzy.config.words == their_deduplication.WORDS


def test_lines_and_shingles(tmp_path):
    assert their_deduplication.lines(corpus(tmp_path)) == 1.0
    assert their_deduplication.shingles("A b  c d\te F g") == ["a b c d e", "b c d e f", "c d e f g"]
    assert their_deduplication.shingles_of_units("He said, 你好吗 ok") == ["he said 你 好 吗", "said 你 好 吗 ok"]


def test_a_sample_is_of_about_the_size_asked_for_whatever_the_order(tmp_path):
    path = corpus(tmp_path)
    deduplication.write_sample(path, tmp_path / "a.parquet", 0.002)
    pq.write_table(pq.read_table(path).take(list(reversed(range(13)))), path)
    deduplication.write_sample(path, tmp_path / "b.parquet", 0.002)
    first, second = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert first == second and len(first) == 5
    assert 0.002 <= deduplication.megabytes_of(tmp_path / "a.parquet") < 0.0026


def peer(name, seconds, found=3.0):
    rounds = [{"seconds": s, "processor_seconds": 2 * s, "busy_elsewhere": 0.0} for s in seconds]
    median = {key: float(np.median([turn[key] for turn in rounds])) for key in rounds[0]}
    return SimpleNamespace(name=name, problem="", rounds=rounds, about={"first_loss": found}, median=median.get)


def test_speeds_are_of_a_megabyte_and_within_rounds():
    peers = {"exact_fuzzy": peer("exact_fuzzy", [10.0, 20.0]), "datasketch": peer("datasketch", [4.0, 16.0])}
    line = deduplication.report(peers["exact_fuzzy"], peers, {"exact_fuzzy": 100.0, "datasketch": 4.0})
    assert line["speed_over_datasketch"] == line["processor_speed_over_datasketch"] == (10 + 20) / 2
    assert line["mb_per_second"] == round(100 / 15, 2) and line["found"] == 3 and "speed_over_rensa" not in line
    peers["datasketch"].problem = "did not start"
    assert deduplication.report(peers["datasketch"], peers, {})["skipped"] == "did not start"
