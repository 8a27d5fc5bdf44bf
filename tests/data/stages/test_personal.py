"""Identifiers of every form are found, look-alikes stay, checksums are those of the standards, and dense sites go."""

import random
from pathlib import Path

import daft
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from llm_jax.data.stages import identifiers
from llm_jax.data.stages.identifiers import CARD_NUMBER, EMAIL, ID_NUMBER, IP_ADDRESS, PHONE
from llm_jax.data.stages.personal import Personal, PersonalConfig
from llm_jax.errors import UserError

FOUND = [
    (EMAIL, "write to {} today", "jane.doe+news@mail.company.co.uk"),
    (EMAIL, "邮箱{}欢迎来信", "li_wei88@163.com"),
    (EMAIL, "(mailto:{})", "o-brien@uni-bonn.de"),
    (ID_NUMBER, "身份证号码{}。", "11010519491231002X"),  # the standard's own example
    (ID_NUMBER, "公民身份号码：{}，", "310112198503070626"),
    (ID_NUMBER, "身份证号：{}", "110105491231002"),
    (CARD_NUMBER, "card {} expires", "4539 5787 6362 1486"),
    (CARD_NUMBER, "卡号{}开户行", "6205500000000000004"),
    (CARD_NUMBER, "Amex {}.", "3782-822463-10005"),
    (CARD_NUMBER, "MasterCard {}!", "5500005555555559"),
    (PHONE, "手机：{}，联系人", "13774321320"),
    (PHONE, "电话{}王先生", "138-0013-8000"),
    (PHONE, "tel {}", "+86 139 1234 5678"),
    (PHONE, "座机：{}。", "010-51236699"),
    (PHONE, "联系电话{}、", "（0717）5401220"),
    (PHONE, "电话：{}", "（０７１７）５４０１２２０"),
    (PHONE, "传真：{}", "0755-26584321转803"),
    (PHONE, "Call {} now", "(415) 734-2671"),
    (PHONE, "Call {} now", "1-800-273-8255"),
    (PHONE, "office: {};", "949.858.5900"),
    (PHONE, "Tel:{}-", "+44-1256-305-220"),
    (PHONE, "ring {}", "+49 (30) 4492 8841"),
    (IP_ADDRESS, "a request from {} at noon", "72.14.207.99"),
    (IP_ADDRESS, "服务器地址是{}的", "114.214.96.3"),
    (IP_ADDRESS, "the host {} answers", "8.8.4.4"),
    (IP_ADDRESS, "http://{}/index.html", "1.12.3.4"),
    (IP_ADDRESS, "resolves to {}.", "2a02:42fe::4"),
]
STAYS = [
    "Version 1.2.3.4 is out, and 5.10.2.1 follows.", "django==72.14.20.1", "see section 8.2.4.44 of it",
    "ISBN 978-7-301-12345-6 and 0-306-40615-2, 9787301123456", "on 2007-10-25 12:30:45, 1998-2004, 01/02/2003",
    "listen on 192.168.1.20, 127.0.0.1, 10.0.0.1 or 0.0.0.0", "RFC 5737 has 192.0.2.146 and 203.0.113.77",
    "2001:db8::42 and ::1 and fe80::1", "std::vector and a[1::2], at 12:34:56:78", "user@example.com, a@b.test",
    "git clone git@github.com:somebody/something.git", "@app.route and x @ y.T, n@2x.png@3x",
    "pi is 3.14159265358979 and 1/2pi 0.15915494309189", "18446744073709551615 and 4294967295",
    "根据《中华人民共和国刑法》第一百三十四条和法释〔2015〕22号，罚金13800元", "国函〔1998〕13号，邮编100871",
    "call 555-0123 or (212) 555-0147", "x +10000000 and 2+1234567890", "order number 4539578763621487",
    "身份证号 110105194912310021", "UUID 123e4567-e89b-12d3-a456-426614174000", "$13774321320 and #13774321320",
    "成交金额 221355190501376 手", "1.0.0.127.in-addr.arpa", "id=13774321320&x=1", "in John 3:16:17 and Ps 119:105:3",
    "1994-1030-2213-5519", "13,774,321,320 people and 137.743 213 20", "the OID 1.3.6.1.4.1.311",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sentence", "identifier"), FOUND)
def test_identifiers_are_found_whole(kind: str, sentence: str, identifier: str) -> None:
    text, spans = identifiers.replace(sentence.format(identifier))
    assert [span.kind for span in spans] == [kind]
    assert text == sentence.format(f"<{kind}>")


@pytest.mark.parametrize("text", STAYS)
def test_lookalikes_stay(text: str) -> None:
    assert identifiers.replace(text) == (text, [])


def test_no_identifier_gets_by_the_first_look() -> None:
    texts = pa.array([sentence.format(identifier) for _, sentence, identifier in FOUND])
    assert pc.all(pc.match_substring_regex(texts, identifiers.CANDIDATE)).as_py()


def iso_7064_check(digits: str) -> str:
    """MOD 11-2 by the standard's recursive method."""
    product = 0
    for digit in digits:
        product = (product + int(digit)) * 2 % 11
    return "0123456789X"[(1 - product) % 11]


def test_check_digits() -> None:
    known = ["79927398713", "378282246310005", "5555555555554444", "6011111111111117", "3530111333300000"]
    assert all(identifiers.luhn(number) for number in known)
    assert identifiers.identity_card("11010519491231002x")
    for serial in range(300):
        first = f"31011219850307{serial:03d}"
        right = [last for last in "0123456789X" if identifiers.identity_card(first + last)]
        assert right == [iso_7064_check(first)]
    for number in known:
        others = [number[:-1] + digit for digit in "0123456789" if digit != number[-1]]
        assert not any(identifiers.luhn(other) for other in others)
        swapped = number[:3] + number[4] + number[3] + number[5:]
        assert identifiers.luhn(swapped) == (swapped == number or {number[3], number[4]} == {"0", "9"})
    for place in range(17):  # every single wrong digit is seen
        number = "11010519491231002X"
        wrong = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert not identifiers.identity_card(wrong)


def test_random_numbers_are_rarely_taken_for_identifiers() -> None:
    draw = random.Random(0)
    lengths = (6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20)
    texts = ["".join(draw.choices("0123456789", k=draw.choice(lengths))) for _ in range(6_000)]
    assert sum(bool(identifiers.find(f"number {text} of")) for text in texts) < 0.01 * len(texts)


def documents(texts: list[str], origins: list[str]) -> daft.DataFrame:
    ids = [f"web/{i:08d}" for i in range(len(texts))]
    return daft.from_pydict(
        {"id": ids, "source": ["web"] * len(texts), "language": ["en"] * len(texts),
         "format": ["text"] * len(texts), "origin": origins, "text": texts}
    )  # fmt: skip


def test_documents_and_sites_full_of_them_go(tmp_path: Path) -> None:
    words = "A long enough page about something else. " * 20
    phone = [f"137{i:08d}" for i in range(40)]
    texts = [
        f"first line\n{words} jane@mail.org and 72.14.207.99\nlast", "\n".join(phone[:10]), words,
        *(f"{words[:400]} call {phone[i]}, {phone[i + 1]}" for i in range(20)),
    ]  # fmt: skip
    origins = ["https://good.org/a", "https://good.org/b", "file.txt", *["http://people.net:80/x?y"] * 20]
    result = Personal(PersonalConfig()).apply(documents(texts, origins), tmp_path)
    rows = result.documents.sort("id").to_pylist()
    assert [row["dropped"] for row in rows[:3]] == [None, "personal information", None]
    assert {row["dropped"] for row in rows[3:]} == {"site of personal information"}
    assert rows[0]["text"] == f"first line\n{words} <EMAIL> and <IP_ADDRESS>\nlast"
    assert rows[1]["because"] == "10 in 119 characters"
    assert [row["personal"] for row in rows[:4]] == [2, 10, 0, 2]
    assert rows[2]["text"] == words
    assert result.facts["by_source"] == {"web": {"documents": 22, "email": 1, "phone": 50, "ip_address": 1}}
    assert [site["site"] for site in result.facts["dense_sites"]] == ["people.net"]
    assert not any(number in str(result.facts) for number in phone)


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="site_minimum"):
        PersonalConfig(site_minimum=0)
