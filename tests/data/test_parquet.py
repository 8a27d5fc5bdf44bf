"""Folders of Parquet files: what a worker left that died is not among them."""

import daft
import pyarrow as pa
import pyarrow.parquet as pq

from llm_jax.data import parquet


def test_what_daft_does_not_list_goes(tmp_path):
    folder = tmp_path / "written" / "kept=true"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["half"]}), folder / "orphan.parquet")
    documents = daft.from_pydict({"id": ["a", "b", "c"], "kept": [True, False, True]})
    parquet.write(documents, tmp_path / "written", partition_cols=["kept"])
    (file,) = parquet.files(folder)
    assert pq.read_table(file)["id"].to_pylist() == ["a", "c"]
    assert sorted(parquet.scan([file]).to_pydict()["id"]) == ["a", "c"]
