"""Pages whose main text is known, bombs, and the stage's columns."""

import builtins
import dataclasses

import daft
import pytest

from llm_jax.data import children, pages
from llm_jax.data.prepare import PrepareConfig, stages
from llm_jax.data.stages import COLUMNS
from llm_jax.data.stages.extract import Extract, ExtractConfig
from llm_jax.errors import UserError
from llm_jax.evaluation.sentence_bits import TRANSFORMERS

SENTENCES = [f"Sentence number {i} of the main text says something that no other one says." for i in range(12)]
CODE = "def f(x):\n    if x:\n        return 1\n\n    return 2"
NAVIGATION = "".join(f"<li><a href='/{i}'>Menu entry {i}</a></li>" for i in range(20))


def page(body, head="<title>The title</title>"):
    return f"""<!DOCTYPE html><html><head>{head}<script>var hidden = 1;</script></head><body>
      <nav><ul>{NAVIGATION}</ul></nav><main><article>{body}</article></main>
      <footer>Copyright and imprint of the site</footer></body></html>"""


def extract(html, **options):
    return pages.extract_page(html, ExtractConfig(**options).page_bytes)


def paragraphs(tag="p"):
    return "".join(f"<{tag}>{sentence}</{tag}>" for sentence in SENTENCES)


def test_the_main_text_is_all_there_and_nothing_around_it():
    text = extract(page(paragraphs())).text
    assert text == "# The title\n\n" + "\n\n".join(SENTENCES)


@pytest.mark.parametrize("mark", ["¶", "#"])
def test_a_title_is_not_said_twice(mark):
    heading = f"<h1>Only <code>one</code> heading<a class='headerlink' href='#x'>{mark}</a></h1>"
    text = extract(page(heading + paragraphs())).text
    assert text.startswith("# Only `one` heading\n\nSentence number 0") and text.count("heading") == 1


@pytest.mark.parametrize("markup", [CODE, CODE.replace("def", "<span class='k'>def</span>")])
@pytest.mark.parametrize("around", ["{}", "<ul><li>An entry with code:{}</li></ul>", "<dl><dt>f</dt><dd>{}</dd></dl>"])
def test_blocks_of_code_keep_their_lines(markup, around):
    block = f"<div class='highlight'><pre>\n{markup}\n</pre></div>"
    body = f"<pre>first = 1</pre>{paragraphs()}{around.format(block)}<p>The end of it.</p>"
    text = extract(page(body)).text
    assert "```\nfirst = 1\n```" in text and f"\n\n```\n{CODE}\n```\n\n" in text
    assert text.endswith("The end of it.") and "codeblock" not in text


def test_the_lines_of_the_source_are_not_those_of_the_text():
    chinese = "白日依山尽，\n    黄河入海流。" * 20
    text = extract(
        page(f"<p>{chinese}</p><p>One\n   line <em>of\ntwo</em>\nlines, with snake_case and 2 * 3.</p>")
    ).text
    assert chinese.replace("\n    ", "") in text
    assert "One line *of two* lines, with snake_case and 2 * 3." in text


def test_paragraphs_may_be_divisions():
    assert extract(page(paragraphs("div"))).text.endswith("\n\n".join(SENTENCES))


def test_a_page_may_say_that_it_is_xml():
    html = '<?xml version="1.0" encoding="UTF-8"?>' + page(paragraphs())
    assert SENTENCES[3] in extract(html).text


@pytest.mark.parametrize(
    ("html", "reason", "because"),
    [
        ("", pages.NO_TEXT, None),
        ("<html><body></body></html>", pages.NO_TEXT, None),
        ("<html><head><title>Only a title</title></head><body><img src='x'></body></html>", pages.NO_TEXT, None),
        ("<p>" + "word " * 1000, pages.TOO_LARGE, "5003 bytes"),
        ("<div>" * 400 + "deep" + "</div>" * 400, pages.TOO_DEEP, "Excessive depth"),
    ],
)
def test_why_a_page_has_no_text(html, reason, because):
    found = extract(html, page_bytes=5002)
    assert (found.text, found.reason) == ("", reason)
    assert because is None or found.because.startswith(because)


def test_a_page_that_takes_too_long_costs_itself_alone():
    bomb = "<html><body><p " + " ".join(f"a{i}=''" for i in range(60_000)) + ">words</p></body></html>"
    html = [page(paragraphs()), bomb, page(paragraphs())]
    found = list(pages.extracted(html, ExtractConfig(seconds=1.0)))
    assert [each.reason for each in found] == [None, pages.TOO_SLOW, None]
    assert found[0].text == found[2].text and SENTENCES[0] in found[0].text


def test_what_breaks_a_library_is_one_unreadable_page(monkeypatch):
    def fail(html, limit):
        raise RecursionError("in the library")

    monkeypatch.setattr(pages, "extract_page", fail)
    (found,) = pages.extract_pages(["<p>x"], 100)
    assert found == ("", pages.UNREADABLE, "RecursionError: in the library")


def test_what_ends_a_process_is_one_unreadable_page(monkeypatch):
    dying = "__import__('os')._exit(1) if 'bomb' in str(pages) else [(p, None, None) for p in pages]"

    class Dying(children.Children):
        """Whose function stands for a parser that a page can end."""

        def __init__(self, function, *limits):
            super().__init__(builtins.eval, *limits)

        def call(self, some, limit):
            return [pages.Page(*each) for each in super().call(dying, {"pages": some})]

    monkeypatch.setattr(pages, "Children", Dying)
    found = list(pages.extracted(["a", "bomb", "b"], ExtractConfig(seconds=5.25)))
    assert [each.reason for each in found] == [None, pages.UNREADABLE, None]
    assert found[1].because == "a process ended with status 1"


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    with pytest.raises(UserError, match=r"needs trafilatura.*pip install 'llm-jax\[data\]'") as error:
        pages.check()
    assert "\n" not in str(error.value)


def row(number, format, text):
    return dict(zip(COLUMNS, (f"s/{number:08d}", "s", "und", format, f"http://a.b/{number}", text)))


def test_only_pages_change_and_every_document_comes_back(tmp_path):
    html, short = page(paragraphs()), "<html></html>"
    rows = [row(0, "text", html), row(1, "html", html), row(2, "code", "x = 1\n\n"), row(3, "html", short)]
    rows += [row(i, "html", page(f"<p>{SENTENCES[i % 12]} {i}</p>" + paragraphs())) for i in range(4, 30)]
    documents = daft.from_pylist(rows)
    result = Extract().apply(documents, tmp_path)
    assert result.facts == {"pages": 28}
    found = {row["id"]: row for row in result.documents.to_pylist()}
    assert len(found) == len(rows) == len(result.documents.collect())
    for before in rows:
        after = found[before["id"]]
        changed = before["format"] == "html" and before["text"] != short
        same = [name for name in COLUMNS if after[name] == before[name]]
        assert same == [name for name in COLUMNS if not changed or name not in ("format", "text")]
        assert after["dropped"] == (pages.NO_TEXT if before["text"] == short else None)
        if changed:
            assert (after["format"], after["text"]) == ("text", extract(before["text"]).text)


def test_a_corpus_without_pages_needs_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "check", lambda: pytest.fail("no page is there"))
    result = Extract().apply(daft.from_pylist([row(0, "text", "a")]), tmp_path)
    assert result.facts == {"pages": 0}
    assert result.documents.to_pylist() == [row(0, "text", "a") | {"dropped": None, "because": None}]


def test_limits_are_positive():
    for field in ("page_bytes", "seconds", "memory_bytes"):
        with pytest.raises(UserError, match=f"ExtractConfig.{field}"):
            dataclasses.replace(ExtractConfig(), **{field: 0})


def test_it_is_the_factorys_first_stage():
    assert stages(PrepareConfig(), TRANSFORMERS)[0] == Extract(ExtractConfig())
