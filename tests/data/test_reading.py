"""Every kind of file, whole and damaged, from a folder to the raw documents of a corpus."""

import builtins
import gzip
import hashlib
import io
import json
import logging
import random
import sqlite3
import zlib
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from llm_jax.config import CorpusConfig
from llm_jax.data import children, documents, faults, files, formats, reading, sources, stages
from llm_jax.errors import UserError

CHINESE = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
TRADITIONAL = "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心。"
PAGE = f"<html><head><meta charset='gbk'><title>诗</title></head><body><p>{CHINESE}</p></body></html>"


PEAK_MB = r"int(__import__('re').search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1]) >> 10"


@pytest.fixture
def folder(tmp_path):
    """Of the texts."""
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def read(folder, **options):
    """The facts, and the documents as dictionaries."""
    out = folder.parent / "out"
    facts = reading.read(CorpusConfig(path=str(folder), **options), out)
    assert [path.suffix for path in out.iterdir()] == [".parquet"] * len(list(out.iterdir()))
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(path) for path in sorted(out.iterdir()))
    json.dumps(facts)
    return facts, table.to_pylist()


def texts(folder, **options):
    return [row["text"] for row in read(folder, **options)[1]]


def warc(path, records, packed=True):
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=packed)
        for kind, url, content_type, status, data in records:
            http = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
            if kind == "response":
                record = writer.create_warc_record(url, kind, payload=io.BytesIO(data), http_headers=http)
            else:
                record = writer.create_warc_record(url, kind, io.BytesIO(data), warc_content_type=content_type)
            writer.write_record(record)


RECORDS = [
    ("warcinfo", None, "application/warc-fields", "", b"software: a test"),
    ("response", "http://a.b/page", "text/html; charset=utf-8", "200 OK", PAGE.encode()),
    ("response", "http://a.b/legacy", "text/html", "200 OK", PAGE.encode("gbk")),
    ("request", "http://a.b/page", "application/http", "", b"GET /page"),
    ("response", "http://a.b/gone", "text/html", "404 Not Found", b"<p>No such page.</p>"),
    ("response", "http://a.b/image", "image/png", "200 OK", b"\x89PNG"),
    ("response", "http://a.b/robots.txt", "text/plain", "200 OK", b"User-agent: *"),
    ("conversion", "http://a.b/text", "text/plain", "", CHINESE.encode()),
]


def database(path, table="pages", column="text", rows=("one", "two")):
    connection = sqlite3.connect(path)
    table = table.replace('"', '""')
    connection.execute(f'CREATE TABLE "{table}" (id INTEGER PRIMARY KEY, "{column}")')
    connection.executemany(f'INSERT INTO "{table}" ("{column}") VALUES (?)', [(row,) for row in rows])
    connection.commit()
    connection.close()


def test_documents_are_known_by_the_hashes_of_their_texts(folder):
    (folder / "a.jsonl").write_text('{"text": "One document."}\n{"text": "zwölf"}\n')
    rows = read(folder)[1]
    digests = [hashlib.blake2b(row["text"].encode(), digest_size=8).hexdigest() for row in rows]
    assert [(row["text"], row["document_id"], row["bytes"]) for row in rows] == [
        ("One document.", digests[0], 13), ("zwölf", digests[1], 6)
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows)
    assert reading.identified(table.select(stages.COLUMNS)).equals(table.cast(reading.SCHEMA))


def test_every_kind_of_file_gives_its_documents(folder):
    (folder / "a.txt").write_text("\ufefftext\r\n", newline="")
    (folder / "b.jsonl").write_text('{"text": "one", "n": 1}\n\n{"text": "two"}')
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n')
    (folder / "d.jsonl.zst").write_bytes(b"".join(zstandard.compress(b'{"text": "%d"}\n' % i) for i in range(2)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["cell"]}), folder / "e.parquet")
    (folder / "f.HTM").write_bytes(PAGE.encode("gbk"))
    warc(folder / "g.warc.gz", RECORDS)
    warc(folder / "h.warc.wet", RECORDS[-1:], packed=False)
    database(folder / "i.sqlite", rows=["row"])
    (folder / "in" / "ner").mkdir(parents=True)
    (folder / "in" / "ner" / "x.txt").write_text("inner")
    facts, rows = read(folder)
    page = PAGE
    assert [(row["id"], row["format"], row["origin"], row["text"]) for row in rows] == [
        ("a/00000000", "text", "a.txt", "text\r\n"),
        ("b/00000000", "text", "b.jsonl: line 1", "one"),
        ("b/00000001", "text", "b.jsonl: line 3", "two"),
        ("c/00000000", "text", "c.jsonl.gz: line 1", "packed"),
        ("d/00000000", "text", "d.jsonl.zst: line 1", "0"),
        ("d/00000001", "text", "d.jsonl.zst: line 2", "1"),
        ("e/00000000", "text", "e.parquet: row 0", "cell"),
        ("f/00000000", "html", "f.HTM", page),
        ("g/00000000", "html", "http://a.b/page", page),
        ("g/00000001", "html", "http://a.b/legacy", page),
        ("g/00000002", "text", "http://a.b/robots.txt", "User-agent: *"),
        ("g/00000003", "text", "http://a.b/text", CHINESE),
        ("h_warc/00000000", "text", "http://a.b/text", CHINESE),
        ("i/00000000", "text", "i.sqlite: row 0", "row"),
        ("in/00000000", "text", "in/ner/x.txt", "inner"),
    ]
    assert {(row["source"], row["language"]) for row in rows} == {(name, "und") for name in facts["sources"]}
    assert facts["files"] == 10 and facts["bytes"] == sum(f.stat().st_size for f in folder.rglob("*.*"))
    assert facts["sources"]["g"] == {
        "language": "und", "documents": 4, "text_bytes": 2 * len(page.encode()) + 13 + len(CHINESE.encode()),
    }  # fmt: skip
    assert facts["left_out"] == {faults.NO_PAGE: 2} and facts["repaired"] == {faults.ENCODING: 2}


def test_a_warc_may_be_one_gzip_member(folder):
    warc(folder / "plain", RECORDS, packed=False)
    (folder / "x.warc.gz").write_bytes(gzip.compress((folder / "plain").read_bytes()))
    assert len(texts(folder)) == 4


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "html"])
def test_other_encodings_are_repaired_and_counted(kind, encoding, folder):
    text = "A title\n\n" + "Words before other words, which only null bytes tell. " * 3 + TRADITIONAL
    written = json.dumps({"text": text}, ensure_ascii=False) if kind == "jsonl" else text
    (folder / f"x.{kind}").write_bytes(written.encode(encoding))
    facts, rows = read(folder)
    assert [row["text"] for row in rows] == [text]
    assert facts["repaired"] == {faults.ENCODING: 1} and not facts["left_out"]


LINES = [json.dumps({"text": f"{i} {random.Random(i).getrandbits(400):x}"}).encode() + b"\n" for i in range(12_000)]


UNPACKED = {
    "gz": (gzip.compress, lambda data: zlib.decompressobj(31).decompress(data)),
    "zst": (zstandard.compress, lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
}


@pytest.mark.parametrize("suffix", UNPACKED)
def test_of_a_truncated_file_all_that_is_whole_is_kept(suffix, folder):
    compress, unpack = UNPACKED[suffix]
    packed = compress(b"".join(LINES))
    cut = packed[: len(packed) * 9 // 10]
    (folder / f"x.jsonl.{suffix}").write_bytes(cut)
    facts, rows = read(folder)
    kept, whole = len(rows), unpack(cut).count(b"\n")
    assert whole > 0.8 * len(LINES) and whole - files.BUFFER_BYTES // 100 <= kept <= whole
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in LINES[:kept]]
    assert facts["left_out"] == {faults.DAMAGED: 1}
    assert facts["places"][0]["first"].startswith(f"after line {kept}: ")


def test_of_a_truncated_warc_all_that_is_whole_is_kept(folder):
    for packed in (True, False):
        warc(folder / f"{packed}.warc", RECORDS[1:] * 30, packed=False)
    data = (folder / "True.warc").read_bytes()
    (folder / "True.warc").unlink()
    (folder / "True.warc.gz").write_bytes(gzip.compress(data)[:-20])
    (folder / "False.warc").write_bytes(data[:-20])
    facts, rows = read(folder)
    counts = Counter(row["source"] for row in rows)
    assert counts["False"] == 4 * 30 - 1 and counts["True"] >= 4 * 30 - 2
    assert facts["left_out"][faults.DAMAGED] == 2
    damaged = [place["first"] for place in facts["places"] if place["kind"] == faults.DAMAGED]
    assert damaged[0].startswith("after record 209: record 210 ends")


def write_corrupt_parquet(path):
    """Three row groups, the second of which is damaged."""
    table = pyarrow.table({"text": [str(i) * 50 for i in range(300)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100, compression="zstd")
    group = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(data)


def test_whole_row_groups_of_a_damaged_parquet_file_are_kept(folder):
    write_corrupt_parquet(folder / "x.parquet")
    facts, rows = read(folder)
    whole = [*range(100), *range(200, 300)]
    assert [(row["origin"], row["text"]) for row in rows] == [(f"x.parquet: row {i}", str(i) * 50) for i in whole]
    assert facts["left_out"] == {faults.DAMAGED: 100} and facts["places"][0]["first"].startswith("row 100: ")


def half_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 100}), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_database(path):
    database(path, rows=["x" * 500] * 2000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    path.write_bytes(data)


def two_tables(path):
    database(path, "articles")
    database(path, "pages")


BAD = {
    "null.txt": (lambda p: p.write_bytes(b"a\0b\0c, and words"), "repaired", faults.NULLS, 2, "its text"),
    "null.jsonl": (lambda p: p.write_bytes(b'{"text": "a\0b"}\n'), "repaired", faults.NULLS, 1, "line 1"),
    "surrogate.jsonl": (
        lambda p: p.write_text('{"text": "a"}\n{"text": "b\\ud800c"}\n'), "repaired", faults.SURROGATES, 1, "line 2",
    ),
    "mark.jsonl": (
        lambda p: p.write_text('{"text": "a"}\n{"text": "\ufeffb\ufeff"}\n'), "repaired", faults.MARKS, 2, "line 2",
    ),
    "reference.txt": (lambda p: p.write_text("Tom &amp; Jerry"), "repaired", faults.REFERENCES, 1, "its text"),
    "utf8.txt": (lambda p: p.write_bytes(CHINESE.encode() + b"\xff"), "repaired", faults.CHARACTERS, 1, "byte 0"),
    "utf8.jsonl": (
        lambda p: p.write_bytes(b'{"text": "' + CHINESE.encode() + b'\xff"}'),
        "repaired", faults.CHARACTERS, 1, "line 1",
    ),
    "picture.txt": (
        lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9), "left_out", faults.NO_TEXT, 1, "byte 0",
    ),
    "blank.txt": (lambda p: p.write_text(" \n\n"), "left_out", faults.BLANK, 1, "its text"),
    "json.jsonl": (
        lambda p: p.write_text('{"text": "a"}\n{"text": \n{"te'), "left_out", faults.INVALID, 2, "line 2, Expecting",
    ),
    "nested.jsonl": (lambda p: p.write_text("[" * 100_000), "left_out", faults.INVALID, 1, "line 1, maximum recursion"),
    "list.jsonl": (lambda p: p.write_text("[1]\n"), "left_out", faults.NO_OBJECT, 1, "line 1, list"),
    "field.jsonl": (
        lambda p: p.write_text('{"body": 1, "id": 2}\n'), "left_out", faults.NO_FIELD, 1,
        "line 1, 'text' is not among 'body', 'id' (CorpusConfig.text_field)",
    ),
    "number.jsonl": (lambda p: p.write_text('{"text": 1}\n'), "left_out", faults.NOT_TEXT, 1, "line 1, int"),
    "long.jsonl": (
        lambda p: p.write_text('{"text": "' + "x" * 999 + '"}\n{"text": "short"}\n'), "left_out", faults.TOO_LONG, 1,
        "line 1",
    ),
    "long.html": (lambda p: p.write_text("<p>" + "x" * 999), "left_out", faults.TOO_LONG, 1, "its text"),
    "plain.jsonl.gz": (lambda p: p.write_text("no gzip"), "left_out", faults.UNREADABLE, 1, "Not a gzipped file"),
    "plain.jsonl.zst": (lambda p: p.write_text("no zstd"), "left_out", faults.UNREADABLE, 1, "ZSTD decompress"),
    "half.parquet": (half_parquet, "left_out", faults.UNREADABLE, 1, "Parquet magic bytes"),
    "column.parquet": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), p), "left_out", faults.NO_FIELD, 1,
        "'text' is not among 'body'",
    ),
    "null.parquet": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), p), "left_out", faults.NOT_TEXT, 1,
        "row 1, NoneType",
    ),
    "long.parquet": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "x" * 999]}), p), "left_out",
        faults.TOO_LONG, 1, "row 1",
    ),
    "no.warc": (lambda p: p.write_text("no WARC\r\n\r\n"), "left_out", faults.UNREADABLE, 1, "Unknown archive format"),
    "no.db": (lambda p: p.write_text("no database" * 99), "left_out", faults.UNREADABLE, 1, "file is not a database"),
    "damaged.db": (damaged_database, "left_out", faults.DAMAGED, 1, "after row "),
    "column.db": (
        lambda p: database(p, column="body"), "left_out", faults.NO_FIELD, 1,
        "no 'text' in any table of pages: id, body (CorpusConfig.table, CorpusConfig.text_field)",
    ),
    "tables.db": (
        two_tables, "left_out", faults.NO_FIELD, 1,
        "'text' is in the tables articles, pages: choose one with CorpusConfig.table",
    ),
    "cells.db": (lambda p: database(p, rows=["a", None, 3]), "left_out", faults.NOT_TEXT, 2, "row 1, NoneType"),
    "long.db": (lambda p: database(p, rows=["a", "x" * 999]), "left_out", faults.TOO_LONG, 1, "row 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_counted_and_named_in_one_line(name, folder, caplog, monkeypatch):
    if name.startswith("long"):
        monkeypatch.setattr(formats, "RECORD_BYTES", 900)
    write, side, kind, times, first = BAD[name]
    (folder / "good.txt").write_text("good")
    write(folder / name)
    with caplog.at_level(logging.INFO):
        facts, rows = read(folder)
    other = {"repaired": "left_out", "left_out": "repaired"}[side]
    assert facts[side] == {kind: times} and facts[other] == {}
    (place,) = facts["places"]
    assert (place["kind"], place["file"], place["times"]) == (kind, name, times)
    assert place["first"].startswith(first) or first in place["first"]
    (line,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert kind in line and place["first"] in line and "\n" not in line
    assert "good" in [row["text"] for row in rows]
    for row in rows:
        assert "\0" not in row["text"] and row["text"].strip()


def test_what_is_repaired_keeps_its_other_characters(folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "a\0b\\u0000c\\ud800d\\ud83d\\ude00"}')
    assert texts(folder) == ["abc\ufffdd\U0001f600"]


def test_pages_and_code_keep_their_references(folder):
    (folder / "a.html").write_text("<p>Tom &amp; Jerry</p>")
    (folder / "b.txt").write_text("Tom &amp; Jerry")
    assert sorted(texts(folder)) == ["<p>Tom &amp; Jerry</p>", "Tom & Jerry"]
    (raw,) = formats.finished([formats.Raw("s = '&#39;' + a&amp;b\ufeff", "code", "a.py", "")], faults.Faults())
    assert raw.text == "s = '&#39;' + a&amp;b"


def test_of_a_wide_file_that_is_cut_only_the_last_character_is_lost(folder):
    (folder / "x.txt").write_bytes(CHINESE.encode("utf-16") + b"\0")
    facts, rows = read(folder)
    assert [row["text"] for row in rows] == [CHINESE + "\ufffd"]
    assert facts["repaired"] == {faults.ENCODING: 1, faults.CHARACTERS: 1}


def test_a_corpus_of_which_nothing_can_be_read_is_refused(folder):
    (folder / "x.parquet").write_text("PAR1 no")
    with pytest.raises(UserError, match="nothing of it can be read"):
        read(folder)
    with pytest.raises(UserError, match="no file or folder at"):
        read(folder / "nowhere")


def test_a_link_to_nothing_is_named_and_not_passed_over(folder):
    (folder / "good.txt").write_text("good")
    (folder / "moved.txt").symlink_to(folder / "nowhere.txt")
    with pytest.raises(UserError, match=r"moved\.txt links to a file that is not there"):
        read(folder)


def test_many_faulty_files_are_a_few_lines(folder, caplog):
    for i in range(25):
        (folder / f"{i}.jsonl").write_text("{")
    (folder / "good.txt").write_text("good")
    with caplog.at_level(logging.WARNING):
        facts, _ = read(folder)
    assert facts["left_out"] == {faults.INVALID: 25} and len(facts["places"]) == 25
    assert len(caplog.records) == faults.SHOWN + 1 and "in 15 more files" in caplog.text


def test_the_table_of_a_database_can_be_chosen(folder):
    path = folder / "x.db"
    database(path, "articles", rows=["no"])
    database(path, 'odd "name', rows=["yes", CHINESE.encode("gb18030")])
    connection = sqlite3.connect(path)
    connection.execute('ALTER TABLE "odd ""name" ADD COLUMN more TEXT DEFAULT "' + "x" * 500 + '"')
    connection.execute('CREATE INDEX words ON "odd ""name" (text DESC)')
    connection.commit()
    connection.close()
    assert texts(folder, table='odd "name') == ["yes", CHINESE]


def test_a_column_may_hold_bytes_or_be_encoded_as_a_dictionary(folder):
    column = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"body": column}), folder / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": [CHINESE.encode("gb18030")]}), folder / "b.parquet")
    assert texts(folder, text_field="body") == ["a", "b", "a", CHINESE]


def test_long_texts_are_cut_and_pages_are_not(folder):
    text = "".join(f"paragraph {i}\n" * 20 + "\n" for i in range(1000))
    (folder / "a.txt").write_text(text)
    (folder / "b.html").write_text(f"<p>{text}</p>")
    _, rows = read(folder)
    parts = [row["text"] for row in rows if row["source"] == "a"]
    assert len(parts) > 3 and "".join(parts) == text and max(map(len, parts)) <= 1 << 16
    assert [row["text"] for row in rows if row["source"] == "b"] == [f"<p>{text}</p>"]
    assert [row["id"] for row in rows][: len(parts)] == [f"a/{i:08d}" for i in range(len(parts))]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
@pytest.mark.parametrize("border", ["\n", " ", "，"])
def test_a_text_read_in_blocks_loses_nothing(border, encoding, folder, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1000)
    if border == "，" and encoding == "gb18030":
        border = "，a "
    text = border.join([CHINESE] * 300)
    (folder / "x.txt").write_bytes(text.encode(encoding))
    facts, rows = read(folder)
    assert "".join(row["text"] for row in rows) == text
    assert faults.CHARACTERS not in facts["repaired"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz"])
def test_a_line_of_a_hundred_megabytes_needs_little_memory(name, folder):
    size = 100 << 20
    begin, end = (b"", b"") if name == "x.txt" else (b'{"text": "', b'"}\n{"text": "after"}\n')
    with gzip.open(folder / name, "wb", 1) if name.endswith(".gz") else (folder / name).open("wb") as file:
        file.write(begin)
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
        file.write(end)
    values = {"config": CorpusConfig(path=str(folder)), "out": folder.parent / "out"}
    with children.Children(builtins.eval, 1) as child:
        child.call("__import__('llm_jax.data.reading').__name__")
        before = child.call(PEAK_MB)
        facts = child.call("__import__('llm_jax.data.reading', fromlist=['read']).read(config, out)", values)
        assert child.call(PEAK_MB) - before < 80
    if name == "x.txt":
        assert facts["sources"]["x"]["text_bytes"] == size and not facts["left_out"]
    else:
        assert facts["left_out"] == {faults.TOO_LONG: 1} and facts["sources"]["x"]["documents"] == 1


def test_several_processes_write_the_same_files(folder, monkeypatch):
    monkeypatch.setattr(reading, "PART_BYTES", 3000)
    for i in range(30):
        name = f"{'many/' if i % 2 else ''}{i:02d}.txt"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"document {i} " * (20 * i + 1))
    (folder / "bad.jsonl").write_text('{"text": 1}\n')
    facts, rows = read(folder, workers=1)
    (folder.parent / "out" / "part-00009.parquet").write_text("of a run before")
    monkeypatch.setattr(reading, "PARALLEL_BYTES", 0)
    started = []
    monkeypatch.setattr(
        reading, "Children", lambda *arguments: started.append(arguments) or children.Children(*arguments)
    )
    assert (facts, rows) == read(folder, workers=2)
    assert len(started) == 1 and facts["left_out"] == {faults.NOT_TEXT: 1}
    assert [row["id"] for row in rows if row["source"] == "many"] == [f"many/{i:08d}" for i in range(15)]


def test_a_process_that_is_killed_is_one_line(folder, monkeypatch):
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    monkeypatch.setattr(reading, "PARALLEL_BYTES", 0)
    killed = "__import__('os').kill(__import__('os').getpid(), 9)"

    class Killed(children.Children):
        """Whose processes end at their first call."""

        def __init__(self, function, count):
            super().__init__(builtins.eval, count)

        def call(self, *arguments):
            return super().call(killed)

    monkeypatch.setattr(reading, "Children", Killed)
    with pytest.raises(UserError, match=r"a was not read to its end: a process ended with status -9 \(out of memory"):
        read(folder, workers=2)


def test_documents_of_public_sources(tmp_path, monkeypatch, caplog):
    table = (
        sources.PublicSource("one", "en", None, lambda: iter(["a", " ", "a"]), 1, ("tiny",)),
        sources.PublicSource("small", "en", None, lambda: iter(["a"]), 100, ("tiny",)),
        sources.PublicSource("program", "code", None, lambda: iter(["x = 1"]), 1, ("tiny",)),
    )
    monkeypatch.setattr(sources, "PUBLIC_SOURCES", table)
    config = CorpusConfig(profile="tiny", cache=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        facts = reading.read(config, tmp_path / "out")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    origin = "the interpreter's own files"
    assert [tuple(row.values())[:6] for row in rows] == [
        ("one/00000000", "one", "en", "text", origin, "a"),
        ("one/00000001", "one", "en", "text", origin, "a"),
        ("program/00000000", "program", "code", "code", origin, "x = 1"),
    ]
    assert list(facts["sources_left_out"]) == ["small"] and "left out the source small" in caplog.text
    monkeypatch.setattr(sources, "PUBLIC_SOURCES", table[1:2])
    with pytest.raises(UserError, match="no source of the 'tiny' profile can be had"):
        reading.read(config, tmp_path / "out")


def test_a_full_disk_is_not_a_fault_of_the_files(folder, monkeypatch):
    (folder / "a.txt").write_text("a")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reading.pa.ipc, "new_stream", full)
    with pytest.raises(OSError, match="No space left"):
        read(folder)


def test_a_tokenizer_is_trained_on_the_same_documents(folder):
    (folder / "a.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    (folder / "pages").mkdir()
    for i in range(40):
        (folder / "pages" / f"{i}.html").write_text(page_of(i))
    (folder / "pages" / "empty.html").write_text("<html></html>")
    config = CorpusConfig(path=str(folder), holdout_fraction=0.3)
    found = [document.text for document in sources.sample_documents(config, 0, 0)]
    _, rows = read(folder)
    held_out = [documents.text_hash(page_of(i)) < 0.3 * documents.HASH_RANGE for i in range(40)]
    expected = [f"# Page {i}\n\n" + ("A sentence. " * 30).strip() for i in range(40) if not held_out[i]]
    assert sorted(found) == sorted(["good", *expected]) and 2 < sum(held_out) < 30
    assert {row["text"] for row in rows} >= {page_of(i) for i in range(40)}


def page_of(number):
    return f"<html><title>Page {number}</title><body><p>{'A sentence. ' * 30}</p></body></html>"
