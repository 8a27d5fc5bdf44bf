"""Things put into a corpus on purpose, so that what the factory's stages find can be held against what is there.

Duplicates and garbage are added as new documents; shared paragraphs, personal information, offensive lines and
evaluation items are put into documents that are there. Each has kinds, and some kinds are controls: nothing should take
them. Every planted thing is noted with the stages that may rightly take it. A document serves for one plant alone, and
is chosen among those without an exact duplicate; what is planted depends on the seed and the documents, and not on
their order.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from llm_jax.config import non_negative, positive
from llm_jax.data import planted_texts as texts
from llm_jax.data.documents import CODE, HTML, text_hash
from llm_jax.data.planted_texts import Generator
from llm_jax.data.stages import COLUMNS, ID, corruption
from llm_jax.errors import require
from llm_jax.files import read_lines, write_lines

logger = logging.getLogger(__name__)

DUPLICATES, PARAGRAPHS, PERSONAL = "duplicates", "shared paragraphs", "personal information"
OFFENSIVE, EVALUATION, GARBAGE = "offensive text", "evaluation items", "garbage"
SCATTERED, PASSAGE = "words here and there", "one passage"  # how a near-duplicate is edited
EXACT, NEAR, SHARED = ("exact",), ("fuzzy", "semantic"), ("lines",)
JUNK = ("language", "heuristics", "quality", "lines")  # stages that may drop or cut garbage
COPY, INSIDE, NEW = "copy", "inside", "new"  # a changed copy beside its original; in the document; instead of nothing
SPARE = 200  # documents from which edited copies get their new words
LINES = 8  # of a document of offensive or garbled lines
PLANTED, SPOILED = "/planted_", "/spoiled_"  # in the ids of documents that are not the corpus's own
SPOILED_WAYS = (*corruption.KINDS, "copied", "edited")
EDITED = 0.02  # of an edited copy
FRAGMENT = 10  # words of an item, too few to be looked for
CODE_SET = "humaneval"  # the evaluation set that is code
LEAST_UNITS = {"zh": 26, "en": 13}  # of an item's line that is looked for
PARAGRAPHS_EACH, PARAGRAPH = 5, 300  # how many are shared by many and by few in each language; characters of one
FEW_WORDS = 5  # shorter offensive lines are not planted
NOISE = 80  # characters of a line of it


@dataclasses.dataclass(frozen=True)
class PlantConfig:
    """How much is planted, and where."""

    count: int = 50  # of every kind; fewer where documents of its language are few
    shares: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)  # edited, of near-duplicates
    least_bytes: int = 600  # of a document in which something is planted
    most_bytes: int = 8000
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "count", "least_bytes", "most_bytes")
        non_negative(self, "seed")
        require(
            all(0 < share < 1 for share in self.shares), f"PlantConfig.shares={self.shares} must be between 0 and 1"
        )


class Material(NamedTuple):
    """What is planted of other people's texts."""

    items: Mapping[str, Sequence[str]]  # of evaluation sets
    offensive: Sequence[str]  # labelled English texts that no classifier has learnt
    harmless: Sequence[str]


class Plant(NamedTuple):
    """What was planted, and who may take it."""

    group: str
    kind: str
    language: str
    id: str  # of the document that is or has it
    original: str  # of a duplicate; "" = none
    targets: Sequence[str]  # lines that must go; () = the document, or its original
    stages: Sequence[str]  # that may take it; () = a control
    share: float  # of the original that is edited


class _Made(NamedTuple):
    """What a kind makes of a document's text."""

    text: str
    targets: tuple[str, ...] = ()


Make = Callable[[str, Generator], _Made]
Lines = Callable[[Generator], Sequence[str]]


class _Kind(NamedTuple):
    """One row of the results."""

    group: str
    name: str
    language: str  # of the documents that it needs
    stages: tuple[str, ...]
    place: str  # COPY, INSIDE or NEW
    make: Make
    number: int
    share: float = 0.0


def plant(documents: pa.Table, config: PlantConfig, material: Material, shared_by: int) -> tuple[pa.Table, list[Plant]]:
    """The documents with everything planted, and the list of it, sorted by id.

    Args:
        documents: with the columns COLUMNS.
        config: how much.
        material: other people's texts; empty parts are not planted.
        shared_by: paragraphs are planted into three times as many documents, and into half as many as a control.
    """
    generator = np.random.default_rng(config.seed)
    documents = documents.select(list(COLUMNS)).sort_by(ID)
    hosts = _hosts(documents, config)
    spare = {language: _spare(documents, rows) for language, rows in hosts.items()}
    kinds = [*_duplicates(config, spare), *_paragraphs(documents, hosts, shared_by)]
    kinds += [*_personal(config.count), *_offensive(config.count, material), *_evaluation(config.count, material.items)]
    kinds += [*_garbage(config.count)]
    changed, added, plants = dict[int, str](), list[dict[str, str]](), list[Plant]()
    for kind, row in _turns(kinds, hosts):
        host = {name: documents[name][row].as_py() for name in COLUMNS}
        text, targets = kind.make(host["text"], generator)
        if kind.place == INSIDE:
            identity, changed[row] = host[ID], text
        else:
            identity = f"{host['source']}{PLANTED}{len(added):06d}"
            added.append(host | {ID: identity, "text": text})
        original = host[ID] if kind.place == COPY else ""
        plants.append(Plant(kind.group, kind.name, kind.language, identity, original, targets, kind.stages, kind.share))
    column = [changed.get(row, text) for row, text in enumerate(documents["text"].to_pylist())]
    table = documents.set_column(COLUMNS.index("text"), "text", pa.array(column, pa.string()))
    table = pa.concat_tables([table, pa.Table.from_pylist(added, schema=table.schema)])
    return table, sorted(plants, key=lambda plant: (plant.id, plant.kind))


def _turns(kinds: Sequence[_Kind], hosts: Mapping[str, Sequence[int]]) -> Iterator[tuple[_Kind, int]]:
    """Every kind with each of its documents, none of which another kind gets."""
    for language, rows in hosts.items():
        of_language = [kind for kind in kinds if kind.language == language]
        wanted = sum(kind.number for kind in of_language)
        if wanted > len(rows):
            logger.warning("%d documents in %s for %d plants: fewer of each kind", len(rows), language, wanted)
        queue = iter(rows)
        for kind in of_language:
            yield from ((kind, next(queue)) for _ in range(min(kind.number, kind.number * len(rows) // max(wanted, 1))))


def with_spoiled(documents: pa.Table, share: float, seed: int) -> pa.Table:
    """The documents, and beside this share of them a spoiled or repeated copy, of each way as many: a dirty corpus."""
    generator = np.random.default_rng(seed)
    documents = documents.select(list(COLUMNS)).sort_by(ID)
    added = list[dict[str, str]]()
    for row in documents.to_pylist():
        if generator.random() < share:
            way = SPOILED_WAYS[int(generator.integers(len(SPOILED_WAYS)))]
            name = f"{row['source']}{SPOILED}{len(added):06d}"
            added.append(row | {ID: name, "text": _spoiled(row["text"], way, generator)})
    return pa.concat_tables([documents, pa.Table.from_pylist(added, schema=documents.schema)])


def _spoiled(text: str, way: str, generator: Generator) -> str:
    if way in corruption.KINDS:
        return corruption.corrupt(text, way, generator)
    found = texts.units(text)
    return texts.edited(text, EDITED, found, generator, True) if way == "edited" and found else text


def write(plants: Sequence[Plant], path: Path) -> None:
    """As JSON Lines."""
    write_lines(path, (plant._asdict() for plant in plants))


def read(path: Path) -> list[Plant]:
    """What `write` wrote."""
    tuples = ("targets", "stages")
    return [Plant(**plant | {name: tuple(plant[name]) for name in tuples}) for plant in read_lines(path)]


def language_of(language: str, text: str) -> str:
    """zh, en or code by what a source declares, and by the script where it declares nothing; "" for others."""
    base = language.partition("-")[0]
    if base != "und":
        return base if base in ("zh", "en", CODE) else ""
    found = texts.units(text[:1000])
    return "zh" if 2 * sum(len(unit) == 1 and not unit.isascii() for unit in found) > len(found) else "en"


def _hosts(documents: pa.Table, config: PlantConfig) -> dict[str, list[int]]:
    """The documents of a fitting size without an exact duplicate, by language, in an order drawn from the seed."""
    found: dict[str, list[int]] = {"zh": [], "en": [], CODE: []}
    columns = (documents[name].to_pylist() for name in ("language", "format", "text"))
    seen = Counter[bytes]()
    rows = []
    for row, (language, kind, text) in enumerate(zip(*columns)):
        if config.least_bytes / 2 <= len(text.encode()) <= 2 * config.most_bytes and kind != HTML:
            digest = hashlib.blake2b(" ".join(texts.units(text)).encode(), digest_size=16).digest()
            seen[digest] += 1
            if config.least_bytes <= len(text.encode()) <= config.most_bytes:
                rows.append((row, CODE if kind == CODE else language_of(language, text), digest))
    ids = documents[ID]
    rows.sort(key=lambda found: text_hash(ids[found[0]].as_py(), config.seed))
    for row, language, digest in rows:
        if seen[digest] == 1 and language in found:
            found[language].append(row)
    return found


def _spare(documents: pa.Table, rows: Sequence[int]) -> list[str]:
    return [unit for row in rows[-SPARE:] for unit in texts.units(documents["text"][row].as_py())]


def _duplicates(config: PlantConfig, spare: Mapping[str, Sequence[str]]) -> Iterator[_Kind]:
    other = "other whitespace, case, punctuation and width"
    for language in ("zh", "en"):
        for name, change in (("the same", lambda text, _: text), (other, texts.translated)):
            yield _Kind(DUPLICATES, name, language, EXACT, COPY, _changed(change), config.count)
        for way, share in itertools.product((SCATTERED, PASSAGE), config.shares):
            change = partial(_edited, share, spare[language], way == PASSAGE)
            yield _Kind(DUPLICATES, way, language, NEAR, COPY, _changed(change), config.count, share)


def _edited(share: float, spare: Sequence[str], in_passage: bool, text: str, generator: Generator) -> str:
    return texts.edited(text, share, spare, generator, in_passage)


def _changed(change: Callable[[str, Generator], str]) -> Make:
    return lambda text, generator: _Made(change(text, generator))


def _paragraphs(documents: pa.Table, hosts: Mapping[str, list[int]], shared_by: int) -> Iterator[_Kind]:
    """Paragraphs that too many documents have, and that few have: lines of documents that nothing is planted in."""
    for language in ("zh", "en"):
        taken = [hosts[language].pop() for _ in range(min(2 * PARAGRAPHS_EACH, len(hosts[language]) // 20))]
        for number, row in enumerate(taken):
            line = max(documents["text"][row].as_py().splitlines(), key=len)[:PARAGRAPH].strip()
            many = number % 2 == 0
            name, stages = ("in too many documents", SHARED) if many else ("in few documents", ())
            count = 3 * shared_by if many else max(shared_by // 2, 1)
            yield _Kind(PARAGRAPHS, name, language, stages, INSIDE, partial(_insert, partial(_always, [line])), count)


def _always(lines: Sequence[str], generator: Generator) -> Sequence[str]:
    return lines


def _insert(lines: Lines, text: str, generator: Generator) -> _Made:
    """Put lines of their own, between blank ones, after some line that ends a paragraph; all of them must go."""
    new, before = lines(generator), text.splitlines()
    places = [place for place, line in enumerate([*before[1:], ""], 1) if not line[:1].islower()]
    at = places[int(generator.integers(len(places)))]
    parts = ("\n".join(part) for part in (before[:at], new, before[at:]) if part)
    return _Made("\n\n".join(parts), tuple(new))


def _append(lines: Lines, text: str, generator: Generator) -> _Made:
    """Put lines, made one, at the end of some line; all of them must go."""
    new, before = lines(generator), text.splitlines()
    before[int(generator.integers(len(before)))] += f" {' '.join(new)}"
    return _Made("\n".join(before), tuple(new))


def _personal(count: int) -> Iterator[_Kind]:
    for known, stages in ((texts.PERSONAL, ("personal",)), (texts.LOOKALIKES, ())):
        for name, (language, sentence, make) in known.items():
            yield _Kind(PERSONAL, name, language, stages, INSIDE, partial(_identifier, sentence, make), count)
    any_of = ("heuristics", "quality", "personal")
    yield _Kind(PERSONAL, "list of contacts", "zh", any_of, NEW, _changed(texts.contacts), count)


def _identifier(sentence: str, make: texts.Make, text: str, generator: Generator) -> _Made:
    identifier = make(generator)
    return _insert(partial(_always, [sentence.format(identifier)]), text, generator)._replace(targets=(identifier,))


def _offensive(count: int, material: Material) -> Iterator[_Kind]:
    """Lines, and documents of them; a harmless line is the control."""
    offensive, harmless = (
        sorted(" ".join(text.split()) for text in some if len(text.split()) >= FEW_WORDS)
        for some in (material.offensive, material.harmless)
    )
    if offensive and harmless:
        line, other = partial(_drawn, offensive, 1), partial(_drawn, harmless, 1)
        whole = partial(_joined, partial(_drawn, offensive, LINES))
        yield _Kind(OFFENSIVE, "a line", "en", ("quality",), INSIDE, partial(_insert, line), count)
        yield _Kind(OFFENSIVE, "a document", "en", ("quality",), NEW, _changed(whole), count)
        yield _Kind(OFFENSIVE, "a harmless line", "en", (), INSIDE, partial(_insert, other), count)


def _drawn(choices: Sequence[str], count: int, generator: Generator) -> Sequence[str]:
    return [choices[number] for number in generator.integers(0, len(choices), count)]


def _joined(lines: Lines, text: str, generator: Generator) -> str:
    return "\n".join(lines(generator))


def _evaluation(count: int, items: Mapping[str, Sequence[str]]) -> Iterator[_Kind]:
    """Items as documents, as lines, and inside of lines; a few words of one are the control."""
    stages = ("contamination",)
    for language, sets in _by_language(items).items():
        lines, inside = (partial(_item, put, sets) for put in (_insert, _append))
        if language == CODE:
            yield _Kind(EVALUATION, "in code", language, stages, INSIDE, lines, count)
            continue
        whole = partial(_joined, partial(_lines_of_one, sets))
        part = partial(_insert, partial(_fragment, sets))
        yield _Kind(EVALUATION, "a document", language, stages, NEW, _changed(whole), count)
        yield _Kind(EVALUATION, "lines of a document", language, stages, INSIDE, lines, count)
        yield _Kind(EVALUATION, "inside of a paragraph", language, stages, INSIDE, inside, count)
        yield _Kind(EVALUATION, f"{FRAGMENT} words of one", language, (), INSIDE, part, count)


class _Item(NamedTuple):
    """An item of an evaluation set."""

    lines: list[str]
    targets: tuple[str, ...]  # of the lines, those that are long enough and its own


def _by_language(items: Mapping[str, Sequence[str]]) -> dict[str, list[list[_Item]]]:
    """The items of each set by language, without those that have no long line of their own."""
    found: dict[str, list[list[_Item]]] = {}
    for name, members in sorted(items.items()):
        common = Counter(line for item in members for line in set(_lines(item)))
        by_language: dict[str, list[_Item]] = {}
        for item in members:
            language = CODE if name == CODE_SET else language_of("und", item)
            lines, least = _lines(item), LEAST_UNITS["zh" if language == "zh" else "en"]
            targets = tuple(line for line in lines if len(texts.units(line)) >= least and common[line] == 1)
            if targets:
                by_language.setdefault(language, []).append(_Item(lines, targets))
        for language, several in by_language.items():
            found.setdefault(language, []).append(several)
    return found


def _lines(item: str) -> list[str]:
    return [line.strip() for line in item.splitlines() if line.strip()]


def _one_of(sets: Sequence[Sequence[_Item]], generator: Generator) -> _Item:
    """An item; each set's turn comes as often."""
    some = sets[int(generator.integers(len(sets)))]
    return some[int(generator.integers(len(some)))]


def _item(
    put: Callable[[Lines, str, Generator], _Made], sets: Sequence[Sequence[_Item]], text: str, generator: Generator
) -> _Made:
    item = _one_of(sets, generator)
    return put(partial(_always, item.lines), text, generator)._replace(targets=item.targets)


def _lines_of_one(sets: Sequence[Sequence[_Item]], generator: Generator) -> Sequence[str]:
    return _one_of(sets, generator).lines


def _fragment(sets: Sequence[Sequence[_Item]], generator: Generator) -> Sequence[str]:
    """The first few words of a line of an item."""
    line = _one_of(sets, generator).targets[0]
    return [line[: [found.end() for found in texts.UNIT.finditer(line)][FRAGMENT - 1]]]


def _noise(make: Callable[[Generator, int], str], generator: Generator) -> Sequence[str]:
    return [make(generator, NOISE)]


def _garbage(count: int) -> Iterator[_Kind]:
    for name, (language, make) in texts.GARBAGE.items():
        yield _Kind(GARBAGE, name, language, JUNK, NEW, _changed(make), count)
    for name, language, noise in (
        ("a line of keyboard noise", "en", texts.keyboard_noise),
        ("a line of random characters", "zh", texts.random_ideographs),
    ):
        line = partial(_insert, partial(_noise, noise))
        yield _Kind(GARBAGE, name, language, JUNK, INSIDE, line, count)
