"""The main text of HTML pages, as Markdown: title, paragraphs, lists, tables and code, without what surrounds them.

Pages are parsed in processes of their own, because a page can be made to keep a parser busy for hours, or to end it.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_jax.config import positive
from llm_jax.data.children import ChildError, Children
from llm_jax.errors import UserError

NO_TEXT, TOO_LARGE, TOO_DEEP = "no main text", "too large", "too deep"
TOO_SLOW, UNREADABLE = "too slow", "unreadable page"
CHUNK_BYTES = 1 << 18  # of pages sent to a process at once
# Some generators make each paragraph a division, which trafilatura takes for a part of the page's frame.
TEXT_DIVISIONS = "//div[text()[normalize-space()]]"
ANCHORS = "//a[normalize-space()='¶' or normalize-space()='#' or normalize-space()='§']"
# Lines of the page's source, which are none of the text; code has its own.
WRAPPED = "//text()[contains(., '\n')][not(ancestor::pre)]"
IDEOGRAPH = "[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
BREAK = re.compile(rf"(?<={IDEOGRAPH})\s*\n\s*(?={IDEOGRAPH})|(\s*\n\s*)")
ESCAPED = re.compile(r"\\([^\w\s]|_)")
BULLET = re.compile(r"^( *-)\s+(?=\S)", re.MULTILINE)
HIDDEN = "codeblock7f3a5c"
HIDDEN_BLOCK = re.compile(rf"[` \n]*{HIDDEN}(\d+)e(?: code)*[` \n]*")
SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Limits of what is spent on a page."""

    enabled: bool = True
    page_bytes: int = 1 << 22  # in UTF-8
    seconds: float = 20.0  # of processor time; only a page made for it needs more than a few
    memory_bytes: int = 1 << 31  # of a process that parses pages

    def __post_init__(self) -> None:
        positive(self, "page_bytes", "seconds", "memory_bytes")


class Page(NamedTuple):
    """The text of a page, or why there is none."""

    text: str
    reason: str | None = None
    because: str | None = None


def check() -> None:
    """Raise `UserError` where a library is missing."""
    try:
        import trafilatura  # noqa: F401
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"extracting text from HTML needs trafilatura: pip install 'llm-jax[data]' ({reason})"
        ) from None


def extracted(pages: list[str], config: ExtractConfig) -> Iterator[Page]:
    """The text of each page, in their order, by as many processes as there are cores."""
    children = _children(config)
    chunks = list(_chunks(pages))
    for chunk, call in zip(chunks, children.map((chunk, config.page_bytes) for chunk in chunks)):
        try:
            yield from call.result()
        except ChildError:
            yield from (_alone(page, children, config) for page in chunk)


def _alone(page: str, children: Children, config: ExtractConfig) -> Page:
    """A page of a chunk in which one page took too long or ended the process."""
    try:
        return children.call([page], config.page_bytes)[0]
    except ChildError as error:
        return Page("", TOO_SLOW if error.late else UNREADABLE, str(error))


def _chunks(pages: list[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for page in pages:
        chunk.append(page)
        size += len(page)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@functools.cache
def _children(config: ExtractConfig) -> Children:
    """The processes of this one, which is a worker of Daft or Ray; they end with it."""
    return Children(extract_pages, os.cpu_count() or 1, config.seconds, config.memory_bytes)


def extract_pages(pages: list[str], page_bytes: int) -> list[Page]:
    """What `extract_page` finds in each; a page with which that fails is said to be unreadable."""
    check()
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    found = []
    for page in pages:
        try:
            found.append(extract_page(page, page_bytes))
        except Exception as error:  # of two large libraries, on whatever there is in the world's pages
            found.append(Page("", UNREADABLE, f"{type(error).__name__}: {error}"[:200]))
    return found


def extract_page(page: str, page_bytes: int) -> Page:
    """The title and main text of an HTML page."""
    import trafilatura
    from lxml import html

    data = page.encode()
    if len(data) > page_bytes:
        return Page("", TOO_LARGE, f"{len(data)} bytes")
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False)
    with contextlib.suppress(html.etree.ParserError):  # an empty page
        tree = html.document_fromstring(data, parser=parser)
        if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log):
            return Page("", TOO_DEEP, next(iter(parser.error_log)).message)
        for anchor in tree.xpath(ANCHORS):
            anchor.drop_tree()
        title, code = _title(tree), _hide_code(tree)
        _unwrap(tree)
        for division in tree.xpath(TEXT_DIVISIONS):
            division.tag = "p"
        text = trafilatura.extract(tree, fast=True, output_format="markdown", include_comments=False)
        if text:
            return Page(_with_title(title, _plain(text, code)).strip())
    return Page("", NO_TEXT)


def _unwrap(tree: Any) -> None:
    """Join the lines of paragraphs, with spaces where the language has them."""
    for text in tree.xpath(WRAPPED):
        joined = BREAK.sub(lambda found: " " if found[1] else "", text)
        if text.is_tail:
            text.getparent().tail = joined
        else:
            text.getparent().text = joined


def _title(tree: Any) -> str:
    """The only main heading, else what the page calls itself."""
    headings = [_squeezed(heading) for heading in tree.iter("h1")]
    names = [_squeezed(name) for name in tree.iter("title")]
    return headings[0] if len(headings) == 1 and headings[0] else next(iter(names), "")


def _squeezed(element: Any) -> str:
    return SPACE.sub(" ", element.text_content()).strip()


def _with_title(title: str, text: str) -> str:
    first = SPACE.sub(" ", text.lstrip().partition("\n")[0].replace("`", "").replace("*", "")).strip("# ")
    return text if not title or first == title else f"# {title}\n\n{text}"


def _hide_code(tree: Any) -> list[str]:
    """Put a word in the place of each block of code, whose lines trafilatura would join; the blocks."""
    blocks: list[str] = []
    for block in list(tree.iter("pre")):
        if block.getparent() is not None and (text := block.text_content().strip("\n").rstrip()):
            for child in list(block):
                block.remove(child)
            block.text = f"{HIDDEN}{len(blocks)}e" + " code" * (len(text) // 5)
            blocks.append(text)
    return blocks


def _plain(text: str, code: list[str]) -> str:
    """Markdown without backslashes before punctuation, and with the blocks of code."""
    text = BULLET.sub(r"\1 ", ESCAPED.sub(r"\1", text))
    text = HIDDEN_BLOCK.sub(lambda found: f"\n\n```\n{code[int(found[1])]}\n```\n\n", text)
    return re.sub(r"\n{3,}```", "\n\n```", text)
