"""Other libraries' MinHash deduplication of a Parquet file of documents, and the plainest one of lines.

    python -m benchmarks.peers.their_deduplication datatrove FILE

All take five-word shingles and 112 permutations in 14 bands of 8 rows, as datatrove does by default, in one process.
Candidates are duplicates: none of them compares the texts. Needs datatrove with spacy, datasketch or rensa.
"""

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.peers.serve import serve

WORDS, PERMUTATIONS, BANDS = 5, 112, 14


def texts_of(corpus: Path) -> Iterator[str]:
    """The texts, a batch of the file at a time."""
    for batch in pq.ParquetFile(corpus).iter_batches(columns=["text"]):
        yield from batch["text"].to_pylist()


def shingles(text: str) -> list[str]:
    """What five words between spaces make, in small letters."""
    return _joined(text.lower().split())


def shingles_of_units(text: str) -> list[str]:
    """What five words or Chinese characters make, in small letters and without punctuation: the n-grams of ours."""
    return _joined(re.findall("[\u3400-\u9fff]|[^\\W\u3400-\u9fff]+", text.lower()))


def _joined(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def datasketch(corpus: Path) -> float:
    """Each document is looked up among those before it, and added if none is like it."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
    gone = 0
    for number, text in enumerate(texts_of(corpus)):
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        if index.query(signature):
            gone += 1
        else:
            index.insert(number, signature)
    return float(gone)


def rensa(corpus: Path, cut: Callable[[str], list[str]]) -> float:
    """All signatures and all look-ups in one call each, its fastest way."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets(map(cut, texts_of(corpus)), PERMUTATIONS, 1)
    index = RMinHashLSH(0.8, PERMUTATIONS, BANDS)
    return float(sum(index.query_duplicate_flags_matrix_one_shot(matrix)))


class Splitter:
    """Stands in for datatrove's tokenizer."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words between spaces."""
        return text.split()


def datatrove(corpus: Path, splitter: Any = None) -> float:
    """Its four steps with its defaults; `splitter` instead of spaCy's words."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import ParquetReader

    # It logs some hundred lines to whatever standard error is then.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):

        def run(*steps: Any, tasks: int = 1) -> None:
            logs = f"{folder}/logs"  # by default they would be left in the working folder
            LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=logs, skip_completed=False).run()

        reader = ParquetReader(str(corpus.parent), glob_pattern=corpus.name)
        signature = MinhashDedupSignature(f"{folder}/signatures")
        if splitter:
            signature.word_tokenizer = splitter
        run(reader, signature)
        run(MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets"), tasks=BANDS)
        run(MinhashDedupCluster(f"{folder}/buckets", f"{folder}/gone"))
        run(reader, MinhashDedupFilter(f"{folder}/gone"))
        return sum(path.stat().st_size for path in Path(folder, "gone").glob("*.remove")) / 4  # 32-bit numbers


def lines(corpus: Path) -> float:
    """How many lines are not the first of their kind."""
    seen: set[int] = set()
    total = 0
    for text in texts_of(corpus):
        found = [hash(line) for line in text.split("\n")]
        total += len(found)
        seen.update(found)
    return float(total - len(seen))


IMPLEMENTATIONS: dict[str, Callable[[Path], float]] = {
    "datatrove": datatrove,
    "datatrove_split": lambda corpus: datatrove(corpus, Splitter()),
    "datasketch": datasketch,
    "rensa": lambda corpus: rensa(corpus, shingles_of_units),
    "rensa_split": lambda corpus: rensa(corpus, shingles),
    "lines_set": lines,
}


if __name__ == "__main__":
    serve(lambda: IMPLEMENTATIONS[sys.argv[1]](Path(sys.argv[2])))
