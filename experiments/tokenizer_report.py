"""Tokenizers compared: how few tokens ours and released ones need for held-out text, by language and vocabulary.

    python -m experiments.tokenizer_report --config=configs/tokenizer_report/default.py --workdir=runs/tokenizers

What Table 2 of Baichuan-2 and Figure 3 of Qwen show, on the held-out documents of a corpus: vocabularies of several
sizes trained on the rest of it with Baichuan-2's settings, released tokenizers, and one vocabulary with each of the
settings changed. Three stages: `texts` reads the corpus and keeps both sides, `tokenizers` trains or fetches each
tokenizer and measures it, `report` writes the tables and the figure. What is done is not done again.

Writes to --workdir: texts/, NAME/tokenizer.model of those that are trained, NAME/result.json, report.md, report.json,
tokenizers.png.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from sentencepiece import sentencepiece_model_pb2 as protocol

from experiments import runner
from experiments.stages import check_names, check_workdir, command_of, define_flags, is_done, write_tables
from llm_jax.config import TokenizerConfig, one_of, positive
from llm_jax.data import sources
from llm_jax.data.documents import Document
from llm_jax.errors import require
from llm_jax.evaluation import tokenizer_figures
from llm_jax.evaluation.tables import Table
from llm_jax.files import read_json, read_lines, write_json, write_lines
from llm_jax.tokenization import report as measuring
from llm_jax.tokenization.published import PUBLISHED, LossyPieces, fetch
from llm_jax.tokenization.report import EVERYTHING, Compression, Measurable
from llm_jax.tokenization.sentencepiece_model import SPACE_MARK, SentencePieceTokenizer
from llm_jax.tokenization.train import train, trainer_options

STAGES = ("texts", "tokenizers", "report")
TEXTS, HELDOUT, MODEL, RESULT = "texts", "heldout.jsonl", "tokenizer.model", "result.json"
# Between two calls with one --workdir.
CHANGEABLE = ("vocab_sizes", "published", "settings", "baseline", "training.workers")
AS_IT_IS = "baichuan2"
# SentencePiece's own choices, where they are not Baichuan-2's. Its longest piece is of 16 characters.
DEFAULTS = {
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": False,
    "character_coverage": 0.9995,
    "max_sentencepiece_length": 16,
    "split_digits": False,
    "byte_fallback": False,
}
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    AS_IT_IS: ("Baichuan-2's settings", {}),
    "numbers": ("numbers as they come", {"split_digits": False}),
    "no_spaces": ("no pieces of white space alone", {"allow_whitespace_only_pieces": False}),
    "no_bytes": ("no byte fallback", {"byte_fallback": False}),
    "length_16": ("pieces of at most 16 characters, SentencePiece's default", {"max_sentencepiece_length": 16}),
    "coverage_995": ("coverage .995", {"character_coverage": 0.995}),
    "prefix": ("dummy prefix", {"add_dummy_prefix": True}),
    "defaults": ("all as SentencePiece has it", DEFAULTS),
}
LABELS = {
    "vocab_size": "vocabulary",
    "model_type": "algorithm",
    "byte_fallback": "byte fallback",
    "split_digits": "digits apart",
    "allow_whitespace_only_pieces": "pieces of white space alone",
    "character_coverage": "character coverage",
    "max_sentencepiece_length": "longest piece",
    "normalization_rule_name": "normalisation",
    "remove_extra_whitespaces": "extra white space removed",
    "add_dummy_prefix": "dummy prefix",
}
BESIDE_A_DIGIT = re.compile("[0-9].|.[0-9]", re.DOTALL)
_STAGES, _ONLY = define_flags(STAGES, "125696,cl100k")


@dataclasses.dataclass(frozen=True)
class TokenizerReportConfig:
    """A corpus, and the tokenizers to measure on it."""

    training: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)  # but for size and coverage
    vocab_sizes: tuple[int, ...] = (8192, 16_384, 32_768, 65_536, 125_696)
    small_size: int = 10_000  # of a vocabulary that the characters alone would fill: those below have another coverage
    small_coverage: float = 0.995
    published: tuple[str, ...] = tuple(PUBLISHED)
    baseline: str = "mistral"  # whose tokens count as 1
    settings: tuple[str, ...] = tuple(SETTINGS)  # which to change, one at a time
    settings_size: int = 16_384  # of the vocabularies with changed settings
    settings_bytes: int = 20_000_000  # of text that these are trained on

    def __post_init__(self) -> None:
        require(
            self.training.style == AS_IT_IS,
            f"TokenizerReportConfig.training.style={self.training.style!r}: these are {AS_IT_IS}'s settings",
        )
        positive(self, "settings_size", "settings_bytes")
        require(
            0 < self.small_coverage <= 1,
            f"TokenizerReportConfig.small_coverage={self.small_coverage} must be in (0, 1]",
        )
        least = min(self.vocab_sizes, default=1)
        require(least > 0, f"TokenizerReportConfig.vocab_sizes={self.vocab_sizes} must be positive")
        for field, known in (("published", PUBLISHED), ("settings", SETTINGS)):
            for name in getattr(self, field):
                one_of(f"TokenizerReportConfig.{field}", name, tuple(known))
        for field in ("vocab_sizes", "published", "settings"):
            values = getattr(self, field)
            require(len(set(values)) == len(values), f"TokenizerReportConfig.{field}={values} names one of them twice")
        require(bool(self.vocab_sizes), "TokenizerReportConfig.vocab_sizes is empty: name one size at least")
        require(
            not self.settings or AS_IT_IS in self.settings,
            f"TokenizerReportConfig.settings={self.settings} lacks {AS_IT_IS}, which the others are compared with",
        )
        one_of("TokenizerReportConfig.baseline", self.baseline, self.compared)

    @property
    def compared(self) -> tuple[str, ...]:
        """The names of the tokenizers that are compared: ours by size, then the released ones."""
        return (*map(str, self.vocab_sizes), *self.published)


def run(config: TokenizerReportConfig, workdir: Path, stages: Sequence[str] = STAGES, only: Sequence[str] = ()) -> None:
    """Do the stages; `only` are the tokenizers to be made now, () = all."""
    known = [*config.compared, *config.settings]
    check_names(stages, STAGES, only, known)
    check_workdir(config, workdir, CHANGEABLE)
    if "texts" in stages:
        keep_texts(config, workdir / TEXTS)
    if "tokenizers" in stages:
        require((workdir / TEXTS / HELDOUT).is_file(), f"{workdir} has no texts yet: do the stage `texts` first")
        for name in only or known:
            measure(config, workdir, name)
    if "report" in stages:
        report(config, workdir)


def sample_file(size: int) -> str:
    """The name of the file of about `size` bytes to train on; 0 = all there is."""
    return f"train_{size or 'all'}.jsonl"


def keep_texts(config: TokenizerReportConfig, folder: Path) -> None:
    """Write the texts to train on and the held-out ones, none of which is among them."""
    if is_done(folder / HELDOUT):
        return
    folder.mkdir(parents=True, exist_ok=True)
    corpus, seed = config.training.corpus, config.training.seed
    sizes = {config.training.sample_bytes, *([config.settings_bytes] if config.settings else [])}
    seen: set[str] = set()
    for size in sorted(sizes):
        documents = list(sources.sample_documents(corpus, size, seed))
        seen.update(document.text for document in documents)
        write_lines(folder / sample_file(size), (document._asdict() for document in documents))
    # A text of two sources may be held out of one alone.
    heldout = [document for document in sources.heldout_documents(corpus) if document.text not in seen]
    require(bool(heldout), "no document is held out: raise config.training.corpus.holdout_fraction")
    write_lines(folder / HELDOUT, (document._asdict() for document in heldout))
    print(f"{folder}: {len(seen):,} documents to train on, {len(heldout):,} held out")


def read_texts(path: Path) -> Iterator[Document]:
    """The documents of a file of `keep_texts`."""
    return (Document(**record) for record in read_lines(path))


def measure(config: TokenizerReportConfig, workdir: Path, name: str) -> None:
    """Train or fetch a tokenizer, and count what it makes of the held-out documents: once."""
    folder = workdir / name
    if is_done(folder / RESULT):
        return
    folder.mkdir(exist_ok=True)
    tokenizer = make(config, workdir, name)
    heldout = list(read_texts(workdir / TEXTS / HELDOUT))
    rows = measuring.measure(tokenizer, track(heldout, f"measuring {name}", console=Console(stderr=True)))
    result = {"pieces": tokenizer.vocab_size, "rows": [dataclasses.asdict(row) for row in rows]}
    write_json(folder / RESULT, result)
    print(f"{folder}: {tokenizer.vocab_size:,} pieces, {rows[-1].bytes_per_token:.2f} bytes per token")


def make(config: TokenizerReportConfig, workdir: Path, name: str) -> Measurable:
    """A tokenizer by its name; a vocabulary that was trained before is taken as it is."""
    if name in config.published:
        return fetch(name, sources.cache_folder(config.training.corpus))
    path = workdir / name / MODEL
    changed = name in config.settings
    changes = SETTINGS[name][1] if changed else {}
    if not path.is_file():
        size = config.settings_size if changed else int(name)
        coverage = config.small_coverage if size < config.small_size else 0.0
        training = dataclasses.replace(config.training, vocab_size=size, character_coverage=coverage)
        sample = config.settings_bytes if changed else config.training.sample_bytes
        train(read_texts(workdir / TEXTS / sample_file(sample)), training, path, changes)
    model = path.read_bytes()
    return LossyPieces(model) if name in ("no_bytes", "defaults") else SentencePieceTokenizer(model, str(path))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a tokenizer makes of the held-out documents, by language, the largest first; EVERYTHING is the last."""

    pieces: int
    rows: dict[str, Compression]


def read_results(workdir: Path, names: Sequence[str]) -> dict[str, Result]:
    """Of those tokenizers that are done."""
    found = {}
    for name in names:
        path = workdir / name / RESULT
        if path.is_file():
            values = read_json(path)
            found[name] = Result(values["pieces"], {row["language"]: Compression(**row) for row in values["rows"]})
    return found


def report(config: TokenizerReportConfig, workdir: Path) -> None:
    """Print and write the tables and the figure of all tokenizers that are done."""
    found, changed = read_results(workdir, config.compared), read_results(workdir, config.settings)
    require(
        config.baseline in found,
        f"{workdir} lacks the baseline {config.baseline}: do the stage `tokenizers`, or choose another "
        "--config.baseline",
    )
    baseline = found[config.baseline].rows
    made = [compression(found), relative(found, config), heldout(baseline)]
    trained = [size for size in map(str, config.vocab_sizes) if size in found]
    if trained:
        made.append(checked(trained[-1], (workdir / trained[-1] / MODEL).read_bytes()))
    if AS_IT_IS in changed:
        made.append(settings_table(config, changed))
    command = command_of("tokenizer_report")
    values = {name: dataclasses.asdict(each) for name, each in (found | changed).items()}
    write_json(workdir / "report.json", {"command": command, "baseline": config.baseline, "tokenizers": values})
    rates = {title(name): {row.language: row.bytes_per_token for row in found[name].rows.values()} for name in found}
    pieces = {title(name): each.pieces for name, each in found.items()}
    tokenizer_figures.draw(rates, pieces, [title(size) for size in trained], workdir / "tokenizers.png")
    write_tables(workdir, "Tokenizers compared", command, made)
    print(f"{workdir / 'report.md'}: these tables; tokenizers.png: the figure")


def title(name: str) -> str:
    """What a tokenizer is called in the report."""
    return PUBLISHED[name].title if name in PUBLISHED else f"ours, {int(name):,}"


def compression(found: Mapping[str, Result]) -> Table:
    """Bytes per token, and whether texts come back."""
    languages = list(next(iter(found.values())).rows)
    headings = ("tokenizer", "pieces", *languages, "come back (%)")
    rows = [
        (title(name), f"{each.pieces:,}", *(f"{row.bytes_per_token:.2f}" for row in each.rows.values()), returned(each))
        for name, each in found.items()
    ]
    note = "Come back: held-out documents that decode to their very bytes."
    return Table("Bytes per token (more is better)", headings, tuple(rows), frozenset(headings[1:]), (note,))


def returned(result: Result) -> str:
    """The share of documents that decode to themselves, in percent: 100 only if all do."""
    row = result.rows[EVERYTHING]
    return "100" if row.exact == row.documents else f"{min(99.9, 100 * row.exact / row.documents):.1f}"


def relative(found: Mapping[str, Result], config: TokenizerReportConfig) -> Table:
    """Tokens as a share of the baseline's, for the same text."""
    baseline = found[config.baseline].rows
    headings = ("tokenizer", *baseline)
    rows = [
        (title(name), *(f"{row.tokens / baseline[row.language].tokens:.3f}" for row in each.rows.values()))
        for name, each in found.items()
    ]
    name = f"Tokens, those of {title(config.baseline)} = 1 (less is better)"
    return Table(name, headings, tuple(rows), frozenset(headings[1:]))


def heldout(rows: Mapping[str, Compression]) -> Table:
    """What was measured."""
    headings = ("language", "documents", "kB", "bytes per character")
    cells = [
        (row.language, f"{row.documents:,}", f"{row.bytes / 1e3:,.1f}", f"{row.bytes / row.characters:.2f}")
        for row in rows.values()
    ]
    return Table("The held-out texts", headings, tuple(cells), frozenset(headings[1:]))


def checked(name: str, model: bytes) -> Table:
    """Baichuan-2's settings, what the trained model's file says of them, and what its pieces show."""
    proto: Any = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    asked = trainer_options(TokenizerConfig(vocab_size=int(name)))
    facts = facts_of(proto)
    rows = []
    for option, label in LABELS.items():
        said = recorded(proto, option)
        rows.append((label, _said(asked[option]), _said(said), facts.get(option, "")))
    headings = ("setting", "asked for", "in the model", "in its pieces")
    return Table(f"Baichuan-2's settings in the vocabulary of {int(name):,}", headings, tuple(rows))


def recorded(proto: Any, option: str) -> Any:
    """An option of `trainer_options` as a model's file has it."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if option == "model_type":
        return trainer.ModelType.Name(trainer.model_type).lower()
    if option == "normalization_rule_name":
        return normalizer.name
    return getattr(trainer if hasattr(trainer, option) else normalizer, option)


def facts_of(proto: Any) -> dict[str, str]:
    """What the pieces of a model show of its options."""
    normal = [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces if piece.type == piece.NORMAL]
    blank = [piece for piece in normal if not piece.strip()]
    longest_blank = max(map(len, blank), default=0)
    return {
        "vocab_size": f"{len(proto.pieces):,} pieces",
        "byte_fallback": f"{sum(piece.type == piece.BYTE for piece in proto.pieces)} pieces of a byte",
        "split_digits": f"{sum(bool(BESIDE_A_DIGIT.search(piece)) for piece in normal)} with a digit beside anything",
        "allow_whitespace_only_pieces": f"{len(blank)} of white space, the longest of {longest_blank}",
        "character_coverage": f"{sum(len(piece) == 1 for piece in normal):,} characters",
        "max_sentencepiece_length": f"the longest is of {max(map(len, normal))}",
    }


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def settings_table(config: TokenizerReportConfig, found: Mapping[str, Result]) -> Table:
    """Bytes per token with each setting changed, and how many tokens more or less that is."""
    base = found[AS_IT_IS].rows
    headings = ("changed", *base, "tokens (%)", "come back (%)")
    rows = []
    for name, each in found.items():
        more = 100 * (each.rows[EVERYTHING].tokens / base[EVERYTHING].tokens - 1)
        rates = (f"{row.bytes_per_token:.2f}" for row in each.rows.values())
        rows.append((SETTINGS[name][0], *rates, f"{more:+.1f}" if name != AS_IT_IS else "", returned(each)))
    note = f"{config.settings_size:,} pieces each, trained on about {config.settings_bytes / 1e6:g} MB of the corpus."
    return Table("What each setting does: bytes per token", headings, tuple(rows), frozenset(headings[1:]), (note,))


def main(config: TokenizerReportConfig, workdir: Path) -> None:
    """Run what the flags name."""
    run(config, workdir, _STAGES.value, _ONLY.value)


if __name__ == "__main__":
    runner.main(main, TokenizerReportConfig, "configs/tokenizer_report/default.py", save_config=False)
