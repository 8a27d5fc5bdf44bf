"""Texts with something in them that a stage of the corpus factory should find: copies, identifiers, garbage.

All of it is made here, of other texts or of random numbers, with checksums of its own, so that it is independent of
what it tests.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

# Characters of scripts without spaces between words.
ALONE = (
    r"\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNIT = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")
PUNCTUATION = {",": "，", ".": " –", ";": "；", ":": "：", "!": "！", "?": "？", "(": "（", ")": "）", '"': "“"}
PUNCTUATION |= {
    "，": ",",
    "。": ".",
    "；": ";",
    "：": ":",
    "！": "!",
    "？": "?",
    "（": "(",
    "）": ")",
    "“": '"',
    "、": ",",
}
WIDE_DIGITS = {ord(str(digit)): chr(ord("０") + digit) for digit in range(10)}
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
MENUS = {
    "en": ("Home", "About us", "Contact", "Products", "Log in", "Basket", "Search", "Help", "Terms", "Privacy",
           "Blog", "Newsletter", "Careers", "Site map", "Press", "Returns", "Delivery", "Offers", "Stores"),
    "zh": ("首页", "关于我们", "联系方式", "产品中心", "登录", "购物车", "搜索", "帮助", "使用条款", "隐私", "博客",
           "订阅", "招聘", "网站地图", "新闻", "退换货", "配送", "优惠", "门店"),
}  # fmt: skip

Generator = np.random.Generator
Make = Callable[[Generator], str]


def units(text: str) -> list[str]:
    """The words of a text, and the characters of scripts without spaces: what the factory's stages compare, by Python's
    own rules of what a letter is.
    """
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def edited(text: str, share: float, spare: Sequence[str], generator: Generator, in_passage: bool = False) -> str:
    """A copy with this share of its units changed, all over it or in one passage.

    All over it a third each are replaced, left out and followed by another; in a passage all are replaced. What comes
    in is drawn from `spare`.
    """
    places = [found.span() for found in UNIT.finditer(text)]
    count = max(round(share * len(places)), 1)
    start = int(generator.integers(len(places) - count + 1))
    chosen = range(start, start + count) if in_passage else sorted(generator.permutation(len(places))[:count])
    parts, done = [], 0
    for number, place in enumerate(chosen):
        begin, end = places[place]
        way = "replace" if in_passage else ("replace", "remove", "add")[number % 3]
        space = " " if text[begin:end].isascii() else ""
        new = {"replace": _one(spare, generator), "remove": "", "add": text[begin:end] + space + _one(spare, generator)}
        parts += [text[done:begin], new[way]]
        done = end
    return "".join(parts) + text[done:]


def _one(choices: Sequence[str], generator: Generator) -> str:
    return choices[int(generator.integers(len(choices)))]


def translated(text: str, generator: Generator) -> str:
    """A copy that differs in whitespace, case, punctuation and width alone: every word stays."""
    text = re.sub(r"\s+", lambda _: _one(("\n", "  ", " \t", "\r\n\r\n"), generator), text)
    text = "".join(character.swapcase() if character.isascii() else character for character in text)
    return re.sub("|".join(map(re.escape, PUNCTUATION)), lambda found: PUNCTUATION[found[0]], text).translate(
        WIDE_DIGITS
    )


def filled(pattern: str, generator: Generator) -> str:
    """The pattern with a digit for each #, and one from 2 to 8 for each %."""
    numbers = {"#": (0, 10), "%": (2, 9)}
    return "".join(str(generator.integers(*numbers[sign])) if sign in numbers else sign for sign in pattern)


def luhn_digit(body: str) -> str:
    """The check digit of a card's number: of 10s with it, every second digit doubled."""
    doubled = [2 * int(digit) for digit in body[::-2]]
    total = sum(map(int, body[-2::-2])) + sum(value - 9 if value > 9 else value for value in doubled)
    return str(-total % 10)


def identity_digit(body: str) -> str:
    """The check digit of a Chinese citizen's number: ISO 7064 MOD 11-2, by the standard's recursion."""
    product = 0
    for digit in body:
        product = (product + int(digit)) * 2 % 11
    return "0123456789X"[(1 - product) % 11]


def _identity(generator: Generator) -> str:
    body = filled("3101121975112####", generator)
    return body + identity_digit(body)


def _wrong_identity(generator: Generator) -> str:
    number = _identity(generator)
    return number[:-1] + ("7" if number[-1] == "3" else "3")


def _card(pattern: str, generator: Generator) -> str:
    body = filled(pattern, generator)
    return body + luhn_digit(body)


def _wrong_card(generator: Generator) -> str:
    number = _card("4" + 14 * "#", generator)
    return number[:-1] + str((int(number[-1]) + 1) % 10)


def _in_fours(generator: Generator) -> str:
    number = _card("4" + 14 * "#", generator)
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4))


# What identifies or reaches a person: language, sentence around it, and how one is made.
PERSONAL: dict[str, tuple[str, str, Make]] = {
    "mobile phone": ("zh", "有事请打手机{}找小王。", partial(filled, "13#########")),
    "landline": ("zh", "联系电话：{}，上班时间有人接听。", partial(filled, "0571-%#######")),
    "identity card": ("zh", "请身份证号码为{}的失主前来认领。", _identity),
    "bank card": ("zh", "请把钱汇到卡号{}，开户行在城东。", partial(_card, "62" + 16 * "#")),
    "e-mail, zh": ("zh", "稿件请寄{}，收到后就回信。", partial(filled, "wang####@163.com")),
    "phone, US": ("en", "Please call {} after six in the evening.", partial(filled, "(%1#) %##-####")),
    "phone, international": ("en", "Ring our office on {} at any time.", partial(filled, "+44 20 %### ####")),
    "credit card": ("en", "The journey was charged to card {} last week.", _in_fours),
    "e-mail, en": ("en", "Write to {} for another copy of it.", partial(filled, "anna.berg####@mail.college.org")),
    "IPv4 address": ("en", "The request came from {} before noon.", partial(filled, "72.1##.1##.1##")),
    "IPv6 address": ("en", "The host answered from {} instead.", partial(filled, "2a02" + 7 * ":%###")),
}
# What has the form of one and is nobody's.
LOOKALIKES: dict[str, tuple[str, str, Make]] = {
    "identity card, wrong check digit": ("zh", "登记编号为{}的材料已经归档。", _wrong_identity),
    "document number": ("zh", "依照国发{}号文件办理。", partial(filled, "〔20##〕##")),
    "card, wrong check digit": ("en", "The label says that the order number is {} throughout.", _wrong_card),
    "version": ("en", "The fault was repaired in version {} last spring.", partial(filled, "1.%.%.%")),
    "ISBN": ("en", "Ask the shop for ISBN {} in paper covers.", partial(filled, "978-%-###-#####-%")),
    "time": ("en", "The clock was stopped on {} by the guard.", partial(filled, "19##-11-2% 1#:3#:4#")),
    "reserved phone": ("en", "In the film she gives {} as her number.", partial(filled, "(212) 555-01##")),
    "reserved e-mail": ("en", "The manual writes to {} in all examples.", partial(filled, "anna####@example.com")),
    "private address": ("en", "The printer in the hall is at {} by default.", partial(filled, "192.168.1%.1##")),
}


def contacts(_: str, generator: Generator) -> str:
    """A list of people with their numbers."""
    made = [PERSONAL[name][2] for name in ("mobile phone", "landline", "e-mail, zh", "bank card")]
    rows = ("，".join(make(generator) for make in made) for _ in range(20))
    return "\n".join(f"第{number}号会员：{row}" for number, row in enumerate(rows, 1))


def keyboard_noise(generator: Generator, length: int) -> str:
    """What a cat types: words of neighbouring keys."""
    words, size = [], 0
    while size < length:
        row = _one(KEYS, generator)
        words.append("".join(row[i] for i in generator.integers(0, len(row), int(generator.integers(2, 11)))))
        size += len(words[-1]) + 1
    return " ".join(words)


def random_bytes(generator: Generator, length: int) -> str:
    """Bytes without a meaning, read as UTF-8."""
    return generator.bytes(length).decode(errors="replace").replace("\0", "\x01")


def random_ideographs(generator: Generator, length: int) -> str:
    """Any Chinese characters, with a comma or full stop now and then."""
    points = generator.integers(0x4E00, 0x9FA5, length)
    return "".join(
        chr(point) + ("，" if i % 11 == 7 else "。" if i % 29 == 17 else "") for i, point in enumerate(points)
    )


def menu(generator: Generator, language: str) -> str:
    """The links of a site, one a line, several times over."""
    return "\n".join(_one(MENUS[language], generator) for _ in range(60))


def misread(text: str, written: str, read: str) -> str:
    """A text in one encoding, read as if it were in another."""
    return text.encode(written, errors="replace").decode(read, errors="replace").replace("\0", "\x01")


# What is no text at all: the language of the text that it is made of, and how.
GARBAGE: dict[str, tuple[str, Callable[[str, Generator], str]]] = {
    "UTF-8 read as GBK": ("zh", lambda text, _: misread(text, "utf-8", "gbk")),
    "UTF-8 read as Windows-1252": ("zh", lambda text, _: misread(text, "utf-8", "cp1252")),
    "GBK read as Latin-1": ("zh", lambda text, _: misread(text, "gbk", "latin-1")),
    "random bytes": ("en", lambda text, generator: random_bytes(generator, len(text))),
    "keyboard noise": ("en", lambda text, generator: keyboard_noise(generator, len(text))),
    "random characters": ("zh", lambda text, generator: random_ideographs(generator, len(text))),
    "one line over and over": ("en", lambda text, _: f"{text.strip()[:60].strip()}\n" * 40),
    "one line over and over, zh": ("zh", lambda text, _: f"{text.strip()[:20].strip()}\n" * 40),
    "menu": ("en", lambda _, generator: menu(generator, "en")),
    "menu, zh": ("zh", lambda _, generator: menu(generator, "zh")),
}  # fmt: skip
