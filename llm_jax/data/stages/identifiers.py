"""Strings that identify or reach a person: e-mail and IP addresses, numbers of phones, identity cards and bank cards.

A pattern finds candidates and a check decides, by checksum where there is one. What has the form and is nobody's stays:
addresses that standards reserve for examples and private networks, version numbers, decimal fractions, ISBNs, dates.
Full-width digits count as digits.
"""

import datetime
import ipaddress
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

EMAIL, ID_NUMBER, CARD_NUMBER, PHONE, IP_ADDRESS = KINDS = (
    "EMAIL", "ID_NUMBER", "CARD_NUMBER", "PHONE", "IP_ADDRESS",
)  # fmt: skip
# What some text must contain to hold any of them, in RE2's syntax, for arrays of texts: this lets most texts pass by.
CANDIDATE = (
    r"@|[0-9０-９]{7}|[0-9]{3}[-.][0-9]{4}|[0-9]{4}[- ][0-9]{4}|[0-9]\)? ?[0-9]{3}-[0-9]{4}|\+[0-9]"
    r"|[0-9](?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]:[0-9A-Fa-f:]*:[0-9A-Fa-f]"
)
_NARROW = str.maketrans("０１２３４５６７８９．－＋", "0123456789.-+")
_WIDE = re.compile("[０-９]")


class Span(NamedTuple):
    """Where one was found, in characters."""

    start: int
    stop: int
    kind: str


def triggered(texts: pa.Array) -> npt.NDArray[np.bool_]:
    """For each text which of the searches may find something in it [N, searches]."""
    wide = pc.match_substring_regex(texts, _WIDE.pattern)
    return np.array([pc.or_(wide, pc.match_substring_regex(texts, trigger)) for _, trigger, _, _ in _SEARCHES]).T


def find(text: str, searches: npt.NDArray[np.bool_] | None = None) -> list[Span]:
    """All of a text, in order, none overlapping another; `searches` is its row of `triggered`, if that is there."""
    if searches is None:
        (searches,) = triggered(pa.array([text]))
    plain = text.translate(_NARROW) if _WIDE.search(text) else text
    spans: list[Span] = []
    for kind, _, pattern, check in itertools.compress(_SEARCHES, searches):
        for match in pattern.finditer(plain):
            if check(match) and all(match.end() <= span.start or match.start() >= span.stop for span in spans):
                spans.append(Span(match.start(), match.end(), kind))
    return sorted(spans)


def replace(text: str, searches: npt.NDArray[np.bool_] | None = None) -> tuple[str, list[Span]]:
    """The text with `<KIND>` for each that `find` finds, and where they were."""
    spans = find(text, searches)
    parts, done = [], 0
    for span in spans:
        parts += [text[done : span.start], f"<{span.kind}>"]
        done = span.stop
    return "".join(parts) + text[done:] if spans else text, spans


def luhn(digits: str) -> bool:
    """Whether the last digit is the right check digit (ISO/IEC 7812-1)."""
    doubled = (int(digit) * (2 if i % 2 else 1) for i, digit in enumerate(reversed(digits)))
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


def identity_card(number: str) -> bool:
    """Whether 18 characters are a Chinese citizen's number (GB 11643-1999: region, birthday, ISO 7064 MOD 11-2)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    check = "10X98765432"[sum(int(digit) * weight for digit, weight in zip(number, weights)) % 11]
    return number[:2] in _PROVINCES and _is_date(number[6:14]) and number[17].upper() == check


def old_identity_card(number: str) -> bool:
    """Whether 15 digits are a number of the form used before 1999, which has no check digit."""
    return number[:2] in _PROVINCES and _is_date("19" + number[6:12])


_PROVINCES = frozenset(
    str(code)
    for codes in ((11, 15), (21, 23), (31, 37), (41, 46), (50, 54), (61, 65), (71, 71), (81, 83))
    for code in range(codes[0], codes[1] + 1)
)


def _is_date(digits: str) -> bool:
    try:
        date = datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return 1900 <= date.year <= 2100


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9]", "", match[0])


def _is_identity_card(match: re.Match[str]) -> bool:
    """One of the old form must be called so: one number of 15 digits in eighty has its form by chance."""
    if len(match[0]) == 18:
        return identity_card(match[0])
    return (
        old_identity_card(match[0])
        and _CALLED_ID.search(match.string, max(match.start() - 24, 0), match.start()) is not None
    )


_CALLED_ID = re.compile(r"(?i)身份|证件|证号|\bid\b|identity")


def _is_card(match: re.Match[str]) -> bool:
    """Issuers' first digits and lengths, and the check digit; groups of digits must be those that cards print."""
    digits = _digits(match)
    groups = [len(group) for group in re.split("[ -]", match[0])]
    printed = len(groups) == 1 or groups in ([4, 6, 5], [4, 6, 4]) or all(size == 4 for size in groups[:-1])
    return printed and len(set(digits)) > 2 and _ISSUERS.fullmatch(digits) is not None and luhn(digits)


_ISSUERS = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}|5[1-5][0-9]{14}|2(?:2[2-9]|[3-6][0-9]|7[01])[0-9]{13}|3[47][0-9]{13}"
    r"|62[0-9]{14,17}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]{11}"
)


def _is_email(match: re.Match[str]) -> bool:
    """Not of the domains that RFC 2606 reserves for examples, nor the user of every repository."""
    name, _, domain = match[0].lower().rpartition("@")
    labels = domain.split(".")
    reserved = labels[-1] in ("example", "test", "invalid", "localhost", "local") or "example" in labels[-2:]
    return not reserved and name not in ("git", "you", "your", "user", "username", "name")


def _is_international(match: re.Match[str]) -> bool:
    count = len(_digits(match))
    return 8 <= count <= 15 and (count >= 10 or re.search(r"[0-9][ .()-]+[0-9]", match[0]) is not None)


def _is_american(match: re.Match[str]) -> bool:
    """Not one of the numbers 555-0100 to 555-0199, which are nobody's."""
    return not (match["exchange"] == "555" and match["line"].startswith("01"))


def _is_ip4(match: re.Match[str]) -> bool:
    """A global address. Four small numbers are a version or a section, unless the text speaks of an address."""
    address = ipaddress.IPv4Address(match[0])
    before = match.string[max(match.start() - 24, 0) : match.start()]
    if _VERSION.search(before) or not address.is_global or address.is_multicast:
        return False
    return max(address.packed) >= 20 or _ADDRESS.search(before) is not None


_VERSION = re.compile(r"(?i)(?:\bv|version|ver\.?|release|sections?|§|==|>=|<=|~=|版本|章|节|第)[ :=]*$")
_ADDRESS = re.compile(r"(?i)\b(?:ip|ipv4|address|addr|host|server|ping|from)\b[^.\n]*$|地址[^。\n]*$|://$")


def _is_ip6(match: re.Match[str]) -> bool:
    """A global unicast address (2000::/3) that is none of documentation's."""
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return False
    return match[0].count(":") > 2 and address.packed[0] >> 5 == 1 and address.is_global


def _always(match: re.Match[str]) -> bool:
    return True


# What is looked for, what a text must contain to hold one, in RE2's syntax, its pattern, and what decides.
_Search = tuple[str, str, re.Pattern[str], Callable[[re.Match[str]], bool]]


def _search(kind: str, trigger: str, pattern: str, check: Callable[[re.Match[str]], bool]) -> _Search:
    return kind, trigger, re.compile(pattern, re.VERBOSE), check


_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_AREA = r"(?:10|2[0-9]|[3-9][0-9]{2})"  # codes of China's cities, without the 0 before them
# Not a part of a word, a decimal fraction, a path or a parameter; Chinese characters may be next to it.
_ALONE = r"(?<![0-9A-Za-z_.,$#/=-])"
_NOT_AFTER = r"(?![0-9A-Za-z_]|[.,/-][0-9])"
_SEARCHES = (
    _search(
        EMAIL,
        "@",
        r"(?<![A-Za-z0-9_.+%-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
        r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9_(@-])",
        _is_email,
    ),
    _search(
        ID_NUMBER,
        "[0-9]{14}",
        _ALONE + "[1-9][0-9]{5}(?:(?:19|20)[0-9]{9}[0-9Xx]|[0-9]{9})" + _NOT_AFTER,
        _is_identity_card,
    ),
    _search(
        CARD_NUMBER,
        "[0-9]{12}|[0-9]{4}[ -][0-9]{4}",
        _ALONE + "[2-6][0-9]{3}(?:[ -]?[0-9]){9,15}" + _NOT_AFTER,
        _is_card,
    ),
    _search(  # mobile phones of mainland China
        PHONE,
        "1[3-9][0-9]",
        _ALONE + r"(?:(?:\+|00)?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\1[0-9]{4})" + _NOT_AFTER,
        _always,
    ),
    _search(  # its other phones
        PHONE,
        "[0-9]{7}",
        _ALONE
        + rf"(?:0{_AREA}[- ]|[(（]0{_AREA}[)）][ ]?|(?:\+|00)86[ -]?{_AREA}[- ])"
        + "[2-8][0-9]{6,7}(?:(?:-|转)[0-9]{1,5})?"
        + _NOT_AFTER,
        _always,
    ),
    _search(
        PHONE,
        r"\+[0-9]",
        r"(?<![A-Za-z0-9_.)+\]])\+[1-9][0-9]{0,2}(?:[ .-]?\([0-9]{1,4}\))?(?:[ .-]?[0-9]{2,4}){2,5}" + _NOT_AFTER,
        _is_international,
    ),
    _search(  # North America
        PHONE,
        "[0-9]{3}[-.][0-9]{4}",
        _ALONE
        + r"(?:1[-. ])?(?:\([2-9][0-9]{2}\)[ ]?|[2-9][0-9]{2}([-.]))"
        + r"(?P<exchange>[2-9][0-9]{2})(?(1)\1|-)(?P<line>[0-9]{4})"
        + _NOT_AFTER,
        _is_american,
    ),
    _search(
        IP_ADDRESS,
        r"[0-9](?:\.[0-9]{1,3}){3}",
        rf"(?<![A-Za-z0-9_.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![A-Za-z0-9_]|[.-][0-9]|\.in-addr)",
        _is_ip4,
    ),
    _search(
        IP_ADDRESS,
        "[0-9A-Fa-f]:[0-9A-Fa-f:]*:[0-9A-Fa-f]",
        r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9_:]|[.][0-9])",
        _is_ip6,
    ),
)
