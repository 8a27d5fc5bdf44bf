"""What a stage says of every document: computed once from the text, kept in a small table, joined to the documents.

The table has no text, so that counting what a stage did reads little, and the texts are not written twice.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import daft
import pyarrow as pa
from daft import DataType, col
from daft.functions import coalesce

from llm_jax.data import parquet
from llm_jax.data.ngrams import blocks
from llm_jax.data.stages import ID

REPLACED = "replaced"  # a mark: the text that a document has from now on, null where it keeps its own
ROWS = 2048  # of documents given to a function at once, before they are cut to blocks of text

Judge = Callable[[pa.RecordBatch], Mapping[str, pa.Array]]


def mark(
    documents: daft.DataFrame, judge: Judge, fields: Mapping[str, DataType], scratch: Path, *kept: str
) -> daft.DataFrame:
    """The marks of every document: its id, the columns `kept`, and `fields` as `judge` computes them.

    `judge` gets a batch with all columns of a few documents, about `ngrams.BLOCK_BYTES` of text, and returns an array
    for each of `fields`. It runs now, once; what it says is in `scratch`.
    """
    names = documents.column_names
    struct = DataType.struct(dict(fields))

    @daft.func.batch(return_dtype=struct, unnest=True, batch_size=ROWS, use_process=False)
    def judged(*columns: daft.Series) -> pa.Array:
        batch = pa.record_batch([column.to_arrow() for column in columns], names)
        return _judge_blocks(batch, judge, struct.to_arrow_dtype())

    folder = scratch / "marks"
    parquet.write(documents.select(ID, *kept, judged(*(col(name) for name in names))), folder)
    return parquet.scan(parquet.files(folder))


def join(documents: daft.DataFrame, marks: daft.DataFrame, *names: str) -> daft.DataFrame:
    """The documents with these columns of their marks, which take the place of the documents' own.

    REPLACED is not joined: where it is not null it takes the place of the text.
    """
    others = [col(name) for name in documents.column_names if name not in names]
    joined = documents.select(*others).join(marks.select(ID, *names), on=ID)
    if REPLACED not in names:
        return joined
    return joined.with_column("text", coalesce(col(REPLACED), col("text"))).exclude(REPLACED)


def _judge_blocks(batch: pa.RecordBatch, judge: Judge, kind: pa.DataType) -> pa.Array:
    done, parts = 0, []
    for block in blocks(batch["text"]):
        part = judge(batch.slice(done, len(block)))
        arrays = [pa.array(part[field.name]).cast(field.type) for field in kind]
        parts.append(pa.StructArray.from_arrays(arrays, fields=list(kind)))
        done += len(block)
    return pa.concat_arrays(parts) if parts else pa.array([], kind)
