"""Documents with known duplicates in them, for the stages that look for such."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daft
import pyarrow.parquet as pq

from llm_jax.data.stages import Stage

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def words(count: int, generator: random.Random, vocabulary: int = 20_000) -> list[str]:
    """Made-up words, of which two texts share few n-grams."""
    numbers = (generator.randrange(vocabulary) for _ in range(count))
    return ["".join(LETTERS[(number // 26**place) % 26] for place in range(4)) for number in numbers]


def edited(parts: Sequence[str], share: float, generator: random.Random) -> list[str]:
    """With this share of the parts put in another's place, left out or added, a third each."""
    result = []
    for part in parts:
        chance = generator.random() / share if share else 1
        if chance >= 1 / 3:
            result.append(part)
        if chance < 2 / 3:
            result.append(generator.choice(parts) + "x")
    return result


def documents(
    texts: Sequence[str], ids: Sequence[str] = (), formats: Sequence[str] = (), **columns: Any
) -> daft.DataFrame:
    """With the columns of a stage's input; ids are "here/00000000" and so on unless they are given."""
    ids = ids or [f"here/{i:08d}" for i in range(len(texts))]
    return daft.from_pydict(
        {
            "id": ids,
            "source": [name.split("/")[0] for name in ids],
            "language": ["und"] * len(texts),
            "format": formats or ["text"] * len(texts),
            "origin": ids,
            "text": texts,
            **columns,
        }
    )


def shuffled(given: daft.DataFrame, files: int, folder: Path) -> daft.DataFrame:
    """The same documents in another order, read from this many files."""
    table = given.to_arrow()
    order = random.Random(1).sample(range(len(table)), len(table))
    folder.mkdir()
    for part in range(files):
        pq.write_table(table.take(order[part::files]), folder / f"{part}.parquet", row_group_size=50)
    return daft.read_parquet(f"{folder}/*.parquet")


def apply(stage: Stage, given: daft.DataFrame, scratch: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the stage makes of the documents, by id, and its facts; checks that no document is lost."""
    scratch.mkdir(parents=True, exist_ok=True)
    result = stage.apply(given, scratch)
    rows = result.documents.to_pylist()
    by_id = {row["id"]: row for row in rows}
    assert len(rows) == len(by_id) and set(by_id) == set(given.to_pydict()["id"])
    return by_id, result.facts


def dropped(by_id: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The ids of what a stage dropped, each with what decided it."""
    return {name: row["because"] for name, row in by_id.items() if row["dropped"] is not None}
