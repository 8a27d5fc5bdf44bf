"""Character references (`&amp;`, `&#39;`) in texts that are no markup: what is left of pages without their tags."""

import html
import re
from html.entities import html5

REFERENCE = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Tags and backquotes: a text that is markup, or shows some. A reference in quotation marks is spoken of.
MARKUP = re.compile(r"<[A-Za-z/!?]|`")
QUOTED = re.compile(rf"""["'“‘「『«]{REFERENCE.pattern}["'”’」』»]""")


def decoded(text: str) -> tuple[str, int]:
    """The text with characters in the place of references to them, and how many there were.

    Only references that end with a semicolon count, so that addresses (`?a=1&copy=2`) stay; a no-break space becomes a
    space.
    """
    times = 0

    def character(found: re.Match[str]) -> str:
        nonlocal times
        if found[1][0] != "#" and f"{found[1]};" not in html5:
            return found[0]
        times += 1
        return html.unescape(found[0]).replace("\xa0", " ")

    return REFERENCE.sub(character, text), times


def without_residue(text: str) -> tuple[str, int]:
    """`decoded`, if the references can be nothing but residue; a text that shows markup or code stays as it is."""
    if not REFERENCE.search(text) or MARKUP.search(text) or QUOTED.search(text):
        return text, 0
    return decoded(text)
