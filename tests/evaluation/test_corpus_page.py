"""The page of a corpus run against what the run wrote: numbers, samples that mean harm, and runs that did little."""

import dataclasses
import json
import random
import shutil
from html.parser import HTMLParser

import pytest
from matplotlib.axes import Axes

from experiments import corpus_report, prepare_data
from llm_jax.data.prepare import ORDER, PrepareConfig
from llm_jax.data.stages.contamination import ContaminationConfig
from llm_jax.data.stages.mixture import MixtureConfig
from llm_jax.data.stages.quality import QualityConfig
from llm_jax.errors import UserError
from llm_jax.evaluation import corpus_page, corpus_tables
from tests.data.conftest import ByteTokenizer

HOSTILE = "</pre><script>alert('&amp;')</script><img src=http://example.com/x.png onerror=alert(1)>"
ITEM = "which of these seven old ships was the first to sail around the whole of the wide cape"
BOILERPLATE = "All rights of this page are reserved by its owners."


class Page(HTMLParser):
    """The tags with their attributes, and the tables under their headings as rows of cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self.heading, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.words += data
        if self.inside == "h2":
            self.heading += data
        if self.inside in ("td", "th"):
            self.tables[self.heading][-1][-1] += data

    def rows(self, heading):
        """The cells of a table by its first column, and then by their own headings."""
        first, *rows = self.tables[heading]
        return {row[0]: dict(zip(first, row, strict=True)) for row in rows}


def sentence(generator):
    return " ".join(
        generator.choice(["the", "ship", "old", "cape", "of", "wind", "and", "sea", f"n{i}"]) for i in range(14)
    )


def write_texts(folder):
    """Letters with duplicates of every kind, HTML in their texts, and a source of notes that nothing is wrong with."""
    generator = random.Random(0)
    letters = [". ".join(sentence(generator) for _ in range(6)) + "." for _ in range(30)]
    letters = [f"{HOSTILE} {i}\n{text}\n\n{BOILERPLATE}\n\n{i}" for i, text in enumerate(letters)]
    letters += [
        letters[0].upper(),
        letters[1],
        letters[1],
        letters[2].replace("ship", "boat", 1),
        f"<b>{'x' * 30}",
        "ok",
    ]
    own = ". ".join(sentence(generator) for _ in range(6))
    letters.append(f"{own}.\n\n{ITEM}\n\nwrite to jane.doe@seamail.org or 192.168.7.23")
    notes = [". ".join(sentence(generator) for _ in range(5)) for _ in range(12)]
    folder.mkdir()
    for name, texts in (("letters", letters), ("notes", notes)):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


STAGES = set(ORDER) - {"read", "instructions"}
OFF = {name: dataclasses.replace(getattr(PrepareConfig(), name), enabled=False) for name in STAGES}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder / "texts")
    (folder / "items.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    return folder


def prepare(texts, folder, **changes):
    """A real run; its tokenizer makes bytes of texts."""
    config = PrepareConfig(path=str(texts / "texts"), tokenizer="bytes", audit=100, **changes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepare_data.tokenizers, "load", lambda path: ByteTokenizer())
        prepare_data.main(config, folder)
    return folder


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A run with the stages that need no download."""
    folder = tmp_path_factory.mktemp("done")
    items = ContaminationConfig(sets=(), paths=(str(texts / "items.jsonl"),))
    quality = QualityConfig(lists=False, reference=("notes",), garbage=10.0)  # so little text says nothing of garbage
    return prepare(texts, folder, quality=quality, contamination=items, mixture=MixtureConfig(weights={"notes": 2.0}))


def reports(folder):
    """What the stages say, read without the code under test."""
    paths = sorted((folder / "stages").glob("*/report.json"))
    return {report["name"]: report for report in (json.loads(path.read_text()) for path in paths)}


def shown(folder):
    return Page((folder / "report.html").read_text())


def test_the_tables_numbers_are_the_stages(done):
    page, stages = shown(done), reports(done)
    rows = page.rows("Stages")
    assert list(rows) == list(stages) and {"read", "quality", "fuzzy", "mixture"} < set(rows)
    for name, stage in stages.items():
        cells = rows[name]
        assert int(cells["documents in"]) == stage["documents"]["in"]
        assert int(cells["kept"]) == stage["documents"]["kept"]
        assert float(cells["s"]) == pytest.approx(stage["seconds"], abs=0.05)
        assert int(cells["peak MB"].replace(",", "")) == stage["peak_mb"]
    dropped = {(stage, reason): int(count) for stage, reason, count, _ in page.tables["Why documents were dropped"][1:]}
    assert dropped == {(name, r): c["documents"] for name, stage in stages.items() for r, c in stage["dropped"].items()}
    assert dropped["exact", "exact duplicate"] == 3 and dropped["fuzzy", "near duplicate"] >= 1


def test_bytes_of_a_larger_corpus():
    def report(added, kept, **composition):
        sides = {"in": 200_000_000, "added": added, "kept": kept}
        composed = [{"source": s, "language": s[:2], "bytes": size * 1_000_000} for s, size in composition.items()]
        costs = {"seconds": 8.0, "peak_mb": 1234}
        return {"documents": sides, "bytes": sides, "composition": composed, **costs}

    read = report(0, 200_000_000, zh=150, en=50)
    stages = {"read": read, "exact": report(50_000_000, 100_400_000, zh=60, zh_other=20, en=20)}
    rows = corpus_tables.stages(stages).rows
    assert rows[1] == ("exact", "200,000,000", "100,400,000", "200.00", "100.40", "40.2%", "8.0", "25.0", "1,234")
    assert corpus_tables.languages(stages).rows == (
        ("zh", "150.00", "80.00", "75.0%", "80.0%"), ("en", "50.00", "20.00", "25.0%", "20.0%"),
    )  # fmt: skip


def test_what_a_source_lost_adds_up(done):
    rows, stages = shown(done).rows("Documents that each source lost"), reports(done)
    assert set(rows) == {"letters", "notes"}
    dropping = [name for name, stage in stages.items() if stage["dropped"]]
    for source, cells in rows.items():
        losses = [int(cells[name] or 0) for name in dropping]
        assert int(cells["documents"]) - sum(losses) == int(cells["kept"])
        assert int(cells["kept"]) == list(stages.values())[-1]["by_source"][source]["documents_kept"]
    assert int(rows["letters"]["documents"]) == 37 and int(rows["notes"]["documents"]) == 12
    assert rows["notes"]["exact"] == "" and rows["letters"]["exact"] == "3"


def test_what_was_found_is_told(done):
    page, stages = shown(done), reports(done)
    assert page.rows("Personal information that was replaced")["all"]["email"] == "1"
    assert page.rows("Evaluation items in the corpus")["items"]["touched"] == "1"
    assert page.rows("Boilerplate that most documents had")
    assert page.tables["Boilerplate that most documents had"][1][1] == BOILERPLATE
    groups = stages["exact"]["facts"]["largest groups"]
    assert page.tables["Largest groups of exact duplicates"][1] == ["3", groups[0]["kept"], groups[0]["text"]]
    judged = stages["quality"]["facts"]["quality"]
    cells = {row[1]: row for row in page.tables.get("Classifiers on held-out labelled texts", [[]])[1:]}
    assert set(cells) == set(judged)
    assert all(
        float(cells[name][-1]) == pytest.approx(row["area_under_curve"], abs=6e-4) for name, row in judged.items()
    )


def test_the_dataset_and_the_plan_are_the_runs(done):
    page, rest = shown(done), json.loads((done / "report.json").read_text())
    tokens = {
        name: sum(s[split]["tokens"] for split in ("train", "heldout"))
        for name, s in rest["dataset"]["sources"].items()
    }
    rows = page.tables["Dataset"][1:]
    assert {row[0]: int(row[4].replace(",", "")) for row in rows[:2]} == tokens
    assert rows[-1][4] == f"{sum(tokens.values()):,}" and f"{sum(tokens.values()):,} tokens" in page.words
    (title,) = (heading for heading in page.tables if heading.startswith("Mixture for"))
    plan = page.rows(title)
    assert float(plan["notes"]["epochs"]) == pytest.approx(2 * float(plan["letters"]["epochs"]), abs=0.011)
    for row in rest["mixture"]:
        assert float(plan[row["pool"]]["epochs"]) == pytest.approx(row["epochs"], abs=0.005)


def test_texts_are_shown_and_never_run(done):
    page = shown(done)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "img", "table", "tr", "th", "td", "details",
        "summary", "pre",
    }  # fmt: skip
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    audited = [json.loads(line) for path in (done / "stages").glob("*/audit.jsonl") for line in path.open()]
    assert sum(HOSTILE in row["text"] for row in audited) >= 3
    for row in audited:
        assert row["text"] in page.words and row["id"] in page.words
    assert "http" not in (done / "report.html").read_text().replace("http://example.com/x.png", "")


def test_the_figure_says_what_left_and_where(done, monkeypatch, tmp_path):
    texts = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **how: texts.append((x > 0, text)))
    stages = reports(done)
    corpus_page.figures.flow(list(stages.values()), tmp_path / "flow.png")
    for stage in stages.values():
        lost = sum(reason["documents"] for reason in stage["dropped"].values())
        assert ((True, f"−{lost:,}") in texts) or not lost
        size = sum(reason["bytes"] for reason in stage["dropped"].values())
        assert ((False, f"−{corpus_tables.size(size)}") in texts) or not size
        taken = stage["bytes"]["in"] - stage["bytes"]["kept"] - size
        assert ((False, f"−{corpus_tables.size(taken)}") in texts) or taken <= 0
    assert (True, f"{stages['read']['documents']['in']} documents") in texts


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_540, "1.5 kB"), (112_080_000, "112.1 MB"), (2e12, "2.00 TB")],
)
def test_sizes_are_said_as_people_say_them(amount, text):
    assert corpus_tables.size(amount) == text


def test_a_run_that_only_reads_has_a_page_too(texts, tmp_path):
    page = shown(prepare(texts, tmp_path, **OFF))
    assert list(page.rows("Stages")) == ["read"]
    headings = {heading for heading in page.tables if not heading.startswith("Mixture for")}
    assert headings == {"Stages", "Documents that each source lost", "Languages", "Dataset"}
    assert "Nothing." in page.words


def test_a_page_is_made_anew_of_what_the_stages_wrote(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("*.parquet", "figures", "report.html", "dataset"))
    corpus_report.run(corpus_report.CorpusReportConfig(), folder)
    assert (folder / "report.html").read_text() == (done / "report.html").read_text()
    # A run that was stopped: no report of its own, and a stage that is not whole.
    (folder / "report.json").unlink()
    last = sorted((folder / "stages").iterdir())[-1]
    last.rename(last.with_name(last.name + ".partial"))
    corpus_report.run(corpus_report.CorpusReportConfig(run=str(folder)), tmp_path / "elsewhere")
    page = shown(tmp_path / "elsewhere")
    assert "The run is not done" in page.words and "Dataset" not in page.tables
    assert list(page.rows("Stages")) == list(reports(done))[:-1]


def test_another_runs_report_is_not_mixed_in(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("*.parquet", "dataset"))
    report = folder / "stages" / "03_exact" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"seconds": 123.0}))
    assert corpus_page.read(folder).rest == {}


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no stage is done in"):
        corpus_page.read(tmp_path)
