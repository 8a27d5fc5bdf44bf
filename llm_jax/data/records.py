"""The tokenised dataset on disk: a TFDS dataset in ArrayRecord files, written and read without TensorFlow.

    DATASET/
      dataset_info.json, features.json                  what `tfds.builder_from_directory(DATASET)` reads
      corpus-train_SOURCE.array_record-00000-of-00001   one record a document
      corpus-heldout_SOURCE.array_record-...
      lengths/train_SOURCE.npy                          int32 tokens of every record, in record order
      heldout/SOURCE.jsonl                              the held-out texts themselves, in record order
      tokenizer.model                                   or what else the tokenizer is saved as
      documents.parquet                                 where each document comes from, and its scores
      summary.json                                      counts, file sizes, the tokenizer's digest

A document is stored as `[bos] + ids + [eos]`, with whichever of the two the tokenizer has. A record is the usual
`tf.train.Example`; its tokens are one bytes feature, because a list of integers takes 20 times longer to parse.
"""

import bisect
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax.errors import UserError, require

NAME = "corpus"
VERSION = "1.0.0"
SUMMARY = "summary.json"
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 27  # tokens in one ArrayRecord file
# One record a chunk, so that a random read fetches nothing else. Two bytes a token are compact already: zstd would
# save a third of the disk and make reading a document of 64 KiB of text four times as slow.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The size of one side of a source; `tokens` counts bos and eos."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)  # file name -> bytes, to notice truncation
    records: tuple[int, ...] = ()  # documents in each file


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """One source of a dataset."""

    language: str
    duplicates: int  # exact duplicates that were dropped
    train: SplitSummary
    heldout: SplitSummary


@dataclasses.dataclass(frozen=True)
class Summary:
    """A whole dataset; `tokenizer` is the model file's name inside the dataset's folder."""

    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    fingerprint: str  # of the corpus and the settings that it was made with
    sources: Mapping[str, SourceSummary]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # where training sets none; {} = by tokens

    def split(self, source: str, split: str) -> SplitSummary:
        """The summary of `train` or `heldout` of a source."""
        return getattr(self.sources[source], split)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest of the two types that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def features(vocab_size: int) -> tfds.features.FeaturesDict:
    """The features of a record: token ids, the text's length in UTF-8 bytes and its 64-bit hash in hexadecimal."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=token_dtype(vocab_size), encoding="bytes")
    return tfds.features.FeaturesDict(
        {"tokens": tokens, "text_bytes": tfds.features.Scalar(np.int64), "document_id": tfds.features.Text()}
    )


def shard_name(source: str, split: str, index: int, count: int) -> str:
    """The file name that TFDS gives a shard."""
    return f"{NAME}-{split}_{source}.array_record-{index:05d}-of-{count:05d}"


def lengths_path(folder: Path, source: str, split: str) -> Path:
    """Where the token counts of a split's documents are."""
    return folder / "lengths" / f"{split}_{source}.npy"


def heldout_text_path(folder: Path, source: str) -> Path:
    """Where the held-out texts of a source are."""
    return folder / "heldout" / f"{source}.jsonl"


class SplitWriter:
    """Writes the records of one split of one source, a new file every `SHARD_TOKENS` tokens."""

    def __init__(self, folder: Path, source: str, split: str, vocab_size: int):
        self._folder, self._source, self._split = folder, source, split
        self._dtype = token_dtype(vocab_size)
        self._writer: ArrayRecordWriter | None = None
        self._shards: list[int] = []
        self._shard_tokens = 0
        self._lengths: list[int] = []
        self._text_bytes = 0

    def add(self, tokens: Sequence[int], text_bytes: int, document_id: str) -> None:
        """Append a document."""
        if self._writer is None or self._shard_tokens >= SHARD_TOKENS:
            self._next_shard()
        assert self._writer is not None
        self._writer.write(_serialize(np.array(tokens, self._dtype), text_bytes, document_id))
        self._shards[-1] += 1
        self._shard_tokens += len(tokens)
        self._lengths.append(len(tokens))
        self._text_bytes += text_bytes

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path = self._folder / shard_name(self._source, self._split, len(self._shards), 0)
        self._writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        self._shards.append(0)
        self._shard_tokens = 0

    def finish(self) -> SplitSummary:
        """Close the files under their final names, write the lengths beside them, and check the record count."""
        if self._writer is not None:
            self._writer.close()
        files = {}
        for index, records in enumerate(self._shards):
            partial = self._folder / shard_name(self._source, self._split, index, 0)
            path = partial.with_name(shard_name(self._source, self._split, index, len(self._shards)))
            partial.replace(path)
            found = _open(path).num_records()
            require(found == records, f"{path} holds {found} of {records} records: is the disk full?")
            files[path.name] = path.stat().st_size
        lengths = lengths_path(self._folder, self._source, self._split)
        lengths.parent.mkdir(parents=True, exist_ok=True)
        np.save(lengths, np.array(self._lengths, np.int32))
        tokens = int(np.sum(self._lengths, dtype=np.int64))
        return SplitSummary(len(self._lengths), self._text_bytes, tokens, files, tuple(self._shards))


def write_metadata(folder: Path, summary: Summary) -> None:
    """Write the TFDS metadata and, last, `summary.json`, which makes the folder a dataset."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=NAME,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    splits = [
        tfds.core.SplitInfo(
            name=f"{split}_{source}",
            shard_lengths=list(summary.split(source, split).records),
            num_bytes=sum(summary.split(source, split).files.values()),
            filename_template=template,
        )
        for source in summary.sources
        for split in SPLITS
        if summary.split(source, split).documents
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(summary.vocab_size),
        split_infos=splits,
        filename_template=template,
        description="Documents tokenised by llm_jax: [bos] + ids + [eos] a record, two splits for each source.",
        check_data=False,
    )
    (folder / SUMMARY).write_text(json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n")


def read_summary(folder: Path) -> Summary:
    """Read `summary.json` and check every file's size; `UserError` where the dataset is missing or damaged."""
    require(bool(str(folder)) and folder.is_dir(), f"no dataset at {folder}: write one with experiments.prepare_data")
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{folder} is not a whole dataset (no {SUMMARY}): run experiments.prepare_data again")
    try:
        summary = summary_from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): run experiments.prepare_data again") from None
    for source in summary.sources:
        for split in SPLITS:
            for name, size in summary.split(source, split).files.items():
                _check_size(folder / name, size)
    return summary


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    require(
        found == size, f"{path} has {found} of {size} bytes: truncated or replaced; run experiments.prepare_data again"
    )


def summary_from_json(values: Any) -> Summary:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    sources = {name: source_from_json(source) for name, source in values["sources"].items()}
    return Summary(**{**values, "sources": sources})


def source_from_json(values: Any) -> SourceSummary:
    """The summary of one source from parsed JSON."""
    sides = {split: SplitSummary(**{**values[split], "records": tuple(values[split]["records"])}) for split in SPLITS}
    return SourceSummary(**{**values, **sides})


def heldout_texts(folder: Path, source: str) -> Iterator[str]:
    """The held-out texts of a source, for measures that need bytes rather than tokens."""
    with heldout_text_path(folder, source).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def heldout_line(text: str) -> str:
    """A held-out text as a line of its file."""
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


class TokenReader:
    """Random access to the tokens of one split of one source; opens its files on first use."""

    def __init__(self, folder: Path, source: str, split: str, summary: Summary):
        split_summary = summary.split(source, split)
        self._paths = [folder / name for name in split_summary.files]
        self._starts = np.cumsum([0, *split_summary.records]).tolist()
        self._dtype = token_dtype(summary.vocab_size)
        self._readers: dict[int, ArrayRecordReader] = {}
        self.lengths = np.load(lengths_path(folder, source, split), mmap_mode="r")  # int32, one a document
        require(
            len(self.lengths) == split_summary.documents,
            f"{lengths_path(folder, source, split)} has {len(self.lengths)} lengths for {split_summary.documents} "
            "documents: run experiments.prepare_data again",
        )

    def read(self, documents: Sequence[int]) -> list[np.ndarray]:
        """The token ids of each document, read file by file in one call each."""
        by_file: dict[int, list[int]] = {}
        for slot, document in enumerate(documents):
            by_file.setdefault(bisect.bisect_right(self._starts, document) - 1, []).append(slot)
        tokens: list[np.ndarray] = [np.empty(0, self._dtype)] * len(documents)
        for file, slots in by_file.items():
            records = self._read_file(file, [documents[slot] - self._starts[file] for slot in slots])
            for slot, record in zip(slots, records, strict=True):
                tokens[slot] = np.frombuffer(_features(record)["tokens"].bytes_list.value[0], self._dtype)
        return tokens

    def document_id(self, document: int) -> str:
        """The hash that identifies a document."""
        file = bisect.bisect_right(self._starts, document) - 1
        (record,) = self._read_file(file, [document - self._starts[file]])
        return _features(record)["document_id"].bytes_list.value[0].decode()

    def _read_file(self, file: int, positions: list[int]) -> Sequence[bytes]:
        try:
            if file not in self._readers:
                self._readers[file] = _open(self._paths[file])
            return self._readers[file].read(positions)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{self._paths[file]} is corrupt ({reason}): run experiments.prepare_data again") from None


def _open(path: Path) -> ArrayRecordReader:
    # Read-ahead fetches far more than the one record that a random access is after.
    return ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


def _serialize(tokens: np.ndarray, text_bytes: int, document_id: str) -> bytes:
    """What `features(...).serialize_example` gives, in a tenth of its time."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["tokens"].bytes_list.value.append(tokens.tobytes())
    feature["text_bytes"].int64_list.value.append(text_bytes)
    feature["document_id"].bytes_list.value.append(document_id.encode())
    return example.SerializeToString(deterministic=True)  # else features come in another order in each process


def _features(record: bytes) -> Any:
    return tf_example_pb2.Example.FromString(record).features.feature
