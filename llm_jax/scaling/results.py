"""The results of a sweep as files: results.json holds everything, results.csv a row per trial for a spreadsheet.

People copy and edit such files, so `read` believes nothing: a record that cannot be right is left out by name.
"""

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax import config as config_lib
from llm_jax.errors import UserError, require
from llm_jax.scaling import flops
from llm_jax.scaling.trial import TrialResult

JSON_FILE = "results.json"
CSV_FILE = "results.csv"
MODEL_COLUMNS = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
POSITIVE = (
    "sequence_length",
    "parameters",
    "non_embedding_parameters",
    "tokens",
    "unique_tokens",
    "compute",
    "learning_rate",
    "loss",
)
# Two records with the same of all these are two copies of one run.
SAME_RUN = (
    "model",
    "sequence_length",
    "tokens",
    "unique_tokens",
    "learning_rate",
    "varied",
    "seed",
    "held_out",
)
TOLERANCE = 1e-6  # relative, of what follows from the model


def write(results: Sequence[TrialResult], folder: Path) -> None:
    """Write `results.json` and `results.csv` to `folder`; each replaces an earlier one only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write_to in ((JSON_FILE, _write_json), (CSV_FILE, _write_csv)):
        partial = folder / f"{name}.partial"
        write_to(results, partial)
        partial.replace(folder / name)


def _write_json(results: Sequence[TrialResult], path: Path) -> None:
    records = [dataclasses.asdict(result) for result in results]
    path.write_text(json.dumps({"trials": records}, indent=1) + "\n", encoding="utf-8")


def _write_csv(results: Sequence[TrialResult], path: Path) -> None:
    columns = [f.name for f in dataclasses.fields(TrialResult) if f.name not in ("model", "curve", "varied")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *MODEL_COLUMNS, "varied"])
        for result in results:
            own = [getattr(result, name) for name in columns]
            model = [getattr(result.model, name) for name in MODEL_COLUMNS]
            writer.writerow([*own, *model, " ".join(result.varied)])


def read(path: Path) -> tuple[list[TrialResult], list[str]]:
    """The trials of a `results.json`, and a line for each record that was left out, naming trial and field.

    A record must have every field, of its type; numbers must be finite and positive; parameters and compute must be
    those of its model (`flops`); the curve must ascend in tokens and end with the trial; names must be unique, and no
    two records may be of one run (`SAME_RUN`), which would count as a seed more than there was.
    Raises `UserError` if the file is no results file at all.
    """
    results: dict[str, TrialResult] = {}
    runs: dict[tuple[Any, ...], str] = {}
    problems = []
    for number, record in enumerate(_records(path), start=1):
        name = record.get("name") if isinstance(record, Mapping) else None
        try:
            result = _parse(record)
            require(result.name not in results, "is there twice; the first one counts")
            first = runs.setdefault(tuple(getattr(result, field) for field in SAME_RUN), result.name)
            require(
                first == result.name, f"is the same run as trial {first!r}, by all its settings; the first one counts"
            )
            results[result.name] = result
        except UserError as error:
            problems.append(f"{path}: {f'trial {name!r}' if name else f'trial number {number}'}: {error}")
    return list(results.values()), problems


def _records(path: Path) -> list[Any]:
    require(path.is_file(), f"no results at {path}: name a {JSON_FILE} that a scaling study wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    records = values.get("trials") if isinstance(values, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path} holds no list of trials: name a {JSON_FILE} that a scaling study wrote")
    return records


def _parse(record: Any) -> TrialResult:
    """The record as a trial; `UserError` names the first field that cannot be right."""
    require(isinstance(record, Mapping), f"must be a group of fields, got {record!r:.40}")
    for field in dataclasses.fields(TrialResult):
        require(field.name in record, f"{field.name} is missing")
    try:
        result = config_lib.from_config_dict(TrialResult, record, "trial")
        problem = next(itertools.chain(_number_problems(result), _curve_problems(result), _model_problems(result)), "")
    except OverflowError:
        raise UserError("a number is too large") from None
    require(not problem, problem)
    return result


def _number_problems(result: TrialResult) -> Iterator[str]:
    if not result.name:
        yield "name is empty"
    for field in POSITIVE:
        value = getattr(result, field)
        if not (math.isfinite(value) and value > 0):
            yield f"{field}={value} must be positive and finite"
    if result.seed < 0:
        yield f"seed={result.seed} must not be negative"
    if result.unique_tokens > result.tokens:
        yield f"unique_tokens={result.unique_tokens} must not be above tokens={result.tokens}"


def _curve_problems(result: TrialResult) -> Iterator[str]:
    if not result.curve:
        yield "curve is empty"
        return
    before = 0
    for index, (tokens, loss) in enumerate(result.curve):
        if tokens <= before:
            yield f"curve[{index}] is at {tokens} tokens, after {before}: they must ascend"
        if not (math.isfinite(loss) and loss > 0):
            yield f"curve[{index}] has loss {loss}, which must be positive and finite"
        before = tokens
    if result.curve[-1] != (result.tokens, result.loss):
        yield f"curve ends with {result.curve[-1]}, not with tokens and loss, {(result.tokens, result.loss)}"


def _model_problems(result: TrialResult) -> Iterator[str]:
    count = flops.count(result.model)
    compute = flops.training_flops(result.model, result.sequence_length, result.tokens)
    yield from _unlike(result, "parameters", count.total, "its model")
    yield from _unlike(result, "non_embedding_parameters", count.non_embedding, "its model")
    yield from _unlike(result, "compute", compute, "its model, sequence_length and tokens")


def _unlike(result: TrialResult, field: str, expected: float, source: str) -> Iterator[str]:
    stated = getattr(result, field)
    if not math.isclose(stated, expected, rel_tol=TOLERANCE):
        yield f"{field}={stated} is not that of {source}, {expected:.10g}"
