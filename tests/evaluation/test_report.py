"""The report's arithmetic on numbers chosen by hand, its verdicts, and that its page is safe and self-contained."""

import base64
import dataclasses
import json
from html.parser import HTMLParser

import pytest

from llm_jax.evaluation import figures, report
from llm_jax.evaluation.report import Heldout, Report, Run, Sample, Stage

RUN = Run(
    parameters=5_000_000,
    embedding_parameters=3_000_000,
    architecture="4 layers",
    vocab_size=8192,
    steps=100,
    batch="8 x 256 tokens",
    tokens=2_000_000,
    corpus_tokens=8_000_000,
    corpus_bytes=25_000_000,
    peak_learning_rate=3e-3,
    seed=0,
    train_seconds=120.0,
    tokens_per_second=17_000.0,
    mfu=0.4,
    peak_flops=3.8e11,
    device="cpu with 2 cores",
    versions="jax 0.10",
)
HELDOUT = {
    "laws": Heldout("zh", 2, 1000, 300, {"model": 2000.0, "unigram": 3000.0, "gzip -9": 2500.0, "xz -9e": 1900.0}),
    "code": Heldout("code", 3, 3000, 900, {"model": 3000.0, "unigram": 9000.0, "gzip -9": 4000.0, "xz -9e": 3500.0}),
}
SAMPLE = Sample("def f(", "x): <script>alert('&')</script>\n", "temperature 0.8")
REPORT = Report("A <b>title</b>", RUN, (Stage("pretrain", "python -m x --y='<z>'", 12.0),), HELDOUT, (SAMPLE,))


class Page(HTMLParser):
    """The tags, the image sources and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.words += data


def test_total_weighs_sources_by_their_bytes():
    overall = report.total(HELDOUT)
    assert overall.bits_per_byte() == pytest.approx(
        {"model": 5000 / 4000, "unigram": 12000 / 4000, "gzip -9": 6500 / 4000, "xz -9e": 5400 / 4000}
    )
    assert (overall.documents, overall.tokens) == (5, 1200)


def test_verdict_names_what_is_not_beaten_yet():
    text = report.verdict(HELDOUT, "xz -9e")
    assert "better on 1 of 2 sources" in text
    assert "1.250 against 1.350" in text
    assert text.endswith("It does not yet beat xz -9e on laws.")


def test_verdict_of_a_clean_win_has_no_but():
    assert "not yet" not in report.verdict(HELDOUT, "unigram")


def test_a_tie_is_not_a_win():
    tie = {"laws": dataclasses.replace(HELDOUT["laws"], bits={"model": 10.0, "xz -9e": 10.0})}
    assert "does not yet beat xz -9e on laws" in report.verdict(tie, "xz -9e")


def test_json_holds_the_derived_numbers():
    values = json.loads(json.dumps(report.as_json(REPORT)))
    assert values["run"]["epochs"] == pytest.approx(0.25)
    assert values["heldout"]["all"]["bits_per_byte"]["model"] == pytest.approx(1.25)
    assert values["heldout"]["laws"]["bits_per_byte"]["xz -9e"] == pytest.approx(1.9)
    assert values["samples"][0] == dataclasses.asdict(SAMPLE)


def full_report() -> Report:
    """The report with every method present."""
    bits = {"zstd -19": 3600.0}
    rows = {name: dataclasses.replace(row, bits={**row.bits, **bits}) for name, row in HELDOUT.items()}
    return dataclasses.replace(REPORT, heldout=rows)


def test_page_escapes_everything_and_embeds_its_figures(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG not really")
    text = report.render(full_report(), {"A figure": picture})
    page = Page(text)
    assert "script" not in page.tags
    assert SAMPLE.completion in page.words
    assert "python -m x --y='<z>'" in page.words
    assert "A <b>title</b>" in page.words
    assert page.images == ["data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()]


def test_page_sets_the_best_of_every_row_in_bold():
    text = report.render(full_report(), {})
    rows = {row.split("</td>")[0].split("<td>")[-1]: row for row in text.split("<tr")[1:]}
    assert "<b>1.900</b>" in rows["laws"] and rows["laws"].count("<b>") == 1
    assert "<b>1.000</b>" in rows["code"] and "<b>1.250</b>" in rows["all sources"]


def test_page_says_what_was_run():
    words = Page(report.render(full_report(), {})).words
    for expected in ("5,000,000", "2,000,000 = 100 steps of 8 x 256 tokens", "0.25 epochs", "380 GFLOP/s", "0.003"):
        assert expected in words


def test_smoothing_against_the_weighted_mean_written_out():
    values, decay = [3.0, 1.0, 4.0, 1.0, 5.0], 0.9
    for end in range(1, len(values) + 1):
        weights = [decay ** (end - 1 - i) for i in range(end)]
        expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        assert figures.smooth(values, decay)[end - 1] == pytest.approx(expected)


def test_figures_are_png_files(tmp_path):
    train = [
        {"tokens": t, "cross_entropy": 9 - t, "learning_rate": 1e-3, "tokens_per_second": 1e4 + t, "mfu": 0.4}
        for t in range(1, 6)
    ]
    figures.loss_curve(train, [{"tokens": 5, "loss": 4.5}], tmp_path / "loss.png")
    figures.learning_rate(train, tmp_path / "rate.png")
    figures.throughput(train, tmp_path / "speed.png")
    figures.throughput([{**r, "mfu": 0.0} for r in train], tmp_path / "speed_without_peak.png")
    figures.heldout_bars({name: row.bits_per_byte() for name, row in HELDOUT.items()}, tmp_path / "bars.png")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n") for file in files)


def test_page_gives_equal_settings_once_and_keeps_the_order():
    samples = tuple(
        Sample(prompt, "x", settings) for prompt, settings in (("p1", "hot"), ("p2", "hot"), ("p3", "cold"))
    )
    words = Page(report.render(dataclasses.replace(full_report(), samples=samples), {})).words
    assert words.count("hot") == 1 and words.count("cold") == 1
    assert words.index("hot") < words.index("p1") < words.index("p2") < words.index("cold") < words.index("p3")


def test_expectation_compares_with_llama2():
    # 6,738,415,616 / 5,000,000 = 1347.7 and 2e12 / 2,000,000 = 1e6, to two digits.
    text = report.expectation(RUN)
    assert "about 1,300 times the parameters" in text and "about 1,000,000 times the tokens" in text
