"""Language identification against py3langid one text at a time, and on texts whose language is known."""

from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from llm_jax.data.ngrams import utf8_buffer
from llm_jax.data.stages import language, language_model
from llm_jax.data.stages.language import Language, LanguageConfig, identify, language_names
from llm_jax.errors import UserError

TEXTS = {
    "en": "The committee met on Tuesday and agreed that the bridge should be repaired before the winter.",
    "de": "Der Ausschuss hat am Dienstag beschlossen, dass die Brücke noch vor dem Winter erneuert wird.",
    "es": "La comisión se reunió el martes y acordó que el puente debía repararse antes del invierno.",
    "nl": "De commissie kwam dinsdag bijeen en besloot dat de brug voor de winter hersteld moet worden.",
    "fr": "La commission s'est réunie mardi et a décidé que le pont devait être réparé avant l'hiver.",
    "ru": "Комиссия собралась во вторник и решила, что мост нужно отремонтировать до наступления зимы.",
    "zh": "委员会于星期二开会，同意在冬天到来之前把这座桥修好，费用由市政府承担。",
    "yue": "我哋尋日喺街市見到佢，佢話今日唔得閒，聽日先至嚟探你哋，你記得咪走開。",
    "ja": "委員会は火曜日に集まり、冬になる前に橋を直すことに決めました。費用は市が払います。",
    "ko": "위원회는 화요일에 모여 겨울이 오기 전에 다리를 고치기로 결정하였다.",
}


def documents(rows: list[tuple[str, str, str]]) -> daft.DataFrame:
    """From (declared language, format, text)."""
    languages, formats, texts = (list(column) for column in zip(*rows, strict=True))
    ids = [f"here/{i:08d}" for i in range(len(rows))]
    return daft.from_pydict(
        {"id": ids, "source": ["here"] * len(rows), "language": languages, "format": formats,
         "origin": ids, "text": texts}
    )  # fmt: skip


def run(rows: list[tuple[str, str, str]], folder: Path, **settings: object) -> tuple[list[dict], dict]:
    result = Language(LanguageConfig(**settings)).apply(documents(rows), folder)  # type: ignore[arg-type]
    return result.documents.sort("id").to_pylist(), result.facts


def test_many_at_once_is_py3langid_one_after_the_other() -> None:
    texts = [*TEXTS.values(), "THE QUICK BROWN FOX JUMPS", "12 34 56", "", "!", "TIEFE WOLKEN HEUTE", "Añadir más días"]
    lengths = np.array([len(text.encode()) for text in texts])
    data = np.zeros((len(texts), lengths.max()), np.uint8)
    for row, text in zip(data, texts, strict=True):
        row[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    found = language_model.probabilities(data, lengths)
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    names = language_names()
    for chances, text in zip(found, texts, strict=True):
        expected = dict(model.rank(text))
        np.testing.assert_allclose(chances, [expected[name] for name in names], atol=2e-3)
        assert text in ("", "!") or names[chances.argmax()] == model.classify(text)[0]


def script(character: str) -> int | None:
    """Which letter of which script a character is, None = none; LATIN is any but those of the others."""
    for known, kind in ((language.CANTONESE, language.YUE), (language.MANDARIN, language.ZH)):
        if character in known:
            return kind
    for first, last, kind in (("㐀", "\u9fff", language.HAN), ("\u3040", "\u30ff", language.KANA),
                              ("가", "\ud7af", language.HANGUL)):  # fmt: skip
        if first <= character <= last:
            return kind
    return language.LATIN if "a" <= character.lower() <= "z" and character.isascii() else None


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.text(st.sampled_from("aZ@[`{ \n的嘅㐀鿿ぁヿ가힣、1"), max_size=9), min_size=1),
    st.integers(0, 9),
    st.integers(1, 12),
)
def test_samples_begin_with_a_character_and_their_letters_are_counted(
    texts: list[str], skipped: int, width: int
) -> None:
    data, edges = utf8_buffer(pa.array(texts, pa.large_string()))
    starts = np.minimum(edges[:-1] + skipped, edges[1:])
    samples, lengths = language._samples(data, starts, edges[1:], width)
    counts = language._scripts(samples, language._SCRIPTS)
    for sample, length, found, text in zip(samples, lengths, counts, texts, strict=True):
        rest = text.encode()[skipped:].decode(errors="ignore")
        assert sample[:length].tobytes() == rest.encode()[:width]
        begun = [character for i, character in enumerate(rest) if len(rest[:i].encode()) < width]
        kinds = [script(character) for character in begun]  # of one that the edge cuts, too
        assert found[: language.OTHER].tolist() == [kinds.count(kind) for kind in range(language.OTHER)]


def test_every_language_is_told(tmp_path: Path) -> None:
    rows, facts = run([("und", "text", text) for text in TEXTS.values()], tmp_path)
    assert [row["language"] for row in rows] == list(TEXTS)
    assert all(row["language_score"] > 0.5 and row["dropped"] is None and row["languages"] is None for row in rows)
    counted = [(row["declared"], row["told"], row["language"], row["count"]) for row in facts["declared_told_language"]]
    assert counted == [("und", name, name, 1) for name in sorted(TEXTS)]


def test_what_is_short_or_doubtful_or_code_stays_as_declared(tmp_path: Path) -> None:
    rows, _ = run(
        [("es", "text", "Sí, gracias."), ("und", "text", "1998-2004"), ("code", "code", TEXTS["de"]),
         ("zh-TW", "text", TEXTS["zh"]), ("zh", "text", TEXTS["fr"]), ("en", "text", "")],
        tmp_path,
    )  # fmt: skip
    assert [row["language"] for row in rows] == ["es", "und", "code", "zh-TW", "fr", "en"]


def test_a_document_in_several_languages_has_their_shares(tmp_path: Path) -> None:
    english, chinese = TEXTS["en"] * 6, TEXTS["zh"] * 2
    rows, facts = run([("und", "text", "\n".join([english, chinese, english, TEXTS["en"]] * 3))], tmp_path, windows=16)
    assert rows[0]["language"] == "en"
    listed = rows[0]["languages"].split()
    assert listed[::2] == ["en", "zh"]
    share = len(chinese.encode()) / len((english * 2 + TEXTS["en"] + chinese).encode())
    assert float(listed[3]) == pytest.approx(share, abs=0.011)
    assert facts["mixed_by_source"] == {"here": 1}


def test_cantonese_is_told_by_the_whole_text(tmp_path: Path) -> None:
    quoting = TEXTS["zh"] * 8 + "“佢哋喺度”"
    plain_line = "今日天氣好\n"  # could be either
    about_it = "他说的话是“佢哋喺度”，我们都不知道这是什么意思，那是他的家乡话了。"
    texts = (quoting, TEXTS["yue"] + plain_line * 4, about_it)
    rows, _ = run([("und", "text", text) for text in texts], tmp_path)
    assert [row["language"] for row in rows] == ["zh", "yue", "zh"]


def test_unwanted_languages_are_dropped_with_a_reason(tmp_path: Path) -> None:
    rows, _ = run(
        [("und", "text", TEXTS["zh"]), ("en", "text", TEXTS["ru"]), ("de", "text", "Ja."), ("und", "text", "OK"),
         ("code", "code", "x = 1")],
        tmp_path, wanted=("zh", "en"),
    )  # fmt: skip
    assert [row["dropped"] for row in rows] == [None, "language", "language", None, None]
    assert rows[1]["because"].startswith("ru ")
    with pytest.raises(UserError, match="klingon"):
        run([("und", "text", "x")], tmp_path, wanted=("klingon",))


def test_answers_depend_on_no_neighbour() -> None:
    texts = [text * repeat for repeat in (1, 3, 20) for text in TEXTS.values()]
    together = identify(pa.array(texts, pa.large_string()), LanguageConfig())
    for i, text in enumerate(texts):
        alone = identify(pa.array([text], pa.large_string()), LanguageConfig())
        np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-5)
        np.testing.assert_allclose(alone[1][0], together[1][i], atol=1e-5)


@pytest.mark.parametrize("settings", [{"windows": 0}, {"confidence": 0.95}, {"override": 1.5}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="LanguageConfig"):
        LanguageConfig(**settings)  # type: ignore[arg-type]
