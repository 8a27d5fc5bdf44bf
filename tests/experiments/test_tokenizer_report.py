"""The comparison of tokenizers on a small corpus: its counts, its sides, the settings that it changes, its mistakes."""

import dataclasses
import json
import re

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

from experiments import runner
from experiments import tokenizer_report as experiment
from experiments.tokenizer_report import SETTINGS, TokenizerReportConfig
from llm_jax.config import CorpusConfig, TokenizerConfig
from llm_jax.data import sources
from llm_jax.data.documents import Document
from llm_jax.errors import UserError
from llm_jax.tokenization.train import trainer_options
from tests.data import corpora

CODE = "def function_{0}(first, second):\n        if first > {0}:\n            return second ** {0}\n"
STORY = "In {0} the river of {1} rose by {0} feet, and the people of {2} went up the hill of {1}.\n"
LAW = "第{0}条：白日依山尽，黄河入海流，欲穷千里目，更上一层楼。\n"


def town(i):
    """A name of four syllables."""
    return "".join("bdfghklmnprstvw"[(i * k) % 15] + "aeiou"[(i + k) % 5] for k in (1, 2, 4, 7))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A corpus of three sources of short documents, two sizes and a few settings."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in (("code", CODE), ("stories", STORY), ("laws", LAW)):
        lines = [json.dumps({"text": text.format(1900 + i, chr(0x4E00 + i), town(i)) * 4}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return TokenizerReportConfig(
        training=TokenizerConfig(corpus=CorpusConfig(path=str(folder), holdout_fraction=0.1), workers=1),
        vocab_sizes=(420, 500),
        small_size=450,
        published=(),
        baseline="420",
        settings=("baichuan2", "numbers", "no_bytes", "defaults"),
        settings_size=480,
        settings_bytes=20_000,
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    experiment.run(config, folder)
    return folder


def texts(done, name):
    return [document.text for document in experiment.read_texts(done / "texts" / name)]


def test_no_held_out_document_is_trained_on(done, config):
    heldout = texts(done, "heldout.jsonl")
    everything = {document.text for document in corpora.every_document(config.training.corpus)}
    train = set(texts(done, "train_all.jsonl"))
    assert heldout and not train & set(heldout) and train | set(heldout) == everything
    some = set(texts(done, "train_20000.jsonl"))
    assert some < train and 10_000 < sum(len(text.encode()) for text in some) < 30_000


def test_a_text_of_two_sources_is_not_held_out_if_one_is_trained_on(config, tmp_path, monkeypatch):
    trained = next(sources.sample_documents(config.training.corpus, 0, 0))
    other = Document("other", "en", "seen nowhere else")
    monkeypatch.setattr(sources, "heldout_documents", lambda corpus: iter([trained, other]))
    experiment.keep_texts(config, tmp_path)
    assert [*experiment.read_texts(tmp_path / "heldout.jsonl")] == [other]
    monkeypatch.setattr(sources, "heldout_documents", lambda corpus: iter([trained]))
    with pytest.raises(UserError, match="no document is held out"):
        experiment.keep_texts(config, tmp_path / "again")


def count(path, text_list):
    """Tokens as SentencePiece itself counts them: the models here have no mark of its own in their texts."""
    return sum(map(len, sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text_list)))


def test_the_tables_against_an_independent_count(done):
    heldout = texts(done, "heldout.jsonl")
    size = sum(len(text.encode()) for text in heldout)
    tokens = {name: count(done / name / "tokenizer.model", heldout) for name in ("420", "500", "baichuan2", "numbers")}
    assert tokens["500"] < tokens["420"]
    report = (done / "report.md").read_text()
    assert f"| ours, 500 | 500 | {size / tokens['500']:.2f} | {size / tokens['500']:.2f} | 100 |" in report
    ratio = tokens["500"] / tokens["420"]
    assert f"| ours, 500 | {ratio:.3f} | {ratio:.3f} |" in report and "| ours, 420 | 1.000 | 1.000 |" in report
    more = 100 * (tokens["numbers"] / tokens["baichuan2"] - 1)
    assert re.search(rf"\| numbers as they come \| .* \| \{more:+.1f} \| 100 \|", report)
    values = json.loads((done / "report.json").read_text())["tokenizers"]
    assert values["500"]["rows"]["all"]["bytes"] == size and values["500"]["pieces"] == 500
    assert (done / "tokenizers.png").stat().st_size > 10_000


def test_what_is_lost_is_counted(done):
    rows = experiment.read_results(done, ("420", "no_bytes", "defaults"))
    exact = {name: result.rows["all"].exact for name, result in rows.items()}
    assert exact["420"] == rows["420"].rows["all"].documents
    assert exact["defaults"] == 0  # line ends become spaces
    proto = model(done / "no_bytes" / "tokenizer.model")
    known = {piece.piece.replace("\u2581", " ") for piece in proto.pieces}
    assert exact["no_bytes"] == sum(all(c in known for c in text) for text in texts(done, "heldout.jsonl"))
    assert 0 < exact["no_bytes"] < exact["420"]  # rare characters are held out, and some texts have none


def model(path):
    proto = protocol.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


@pytest.mark.parametrize("name", ["baichuan2", "numbers", "no_bytes", "defaults"])
def test_a_changed_setting_and_no_other_is_in_the_model(done, name):
    proto = model(done / name / "tokenizer.model")
    wanted = {**trainer_options(TokenizerConfig(vocab_size=480)), "character_coverage": 0.9999, **SETTINGS[name][1]}
    for option in experiment.LABELS:
        assert experiment.recorded(proto, option) == pytest.approx(wanted[option]), option
    joined = any(re.search("[0-9]{2}", piece.piece) for piece in proto.pieces if piece.type == piece.NORMAL)
    assert joined is (name in ("numbers", "defaults"))


def test_small_vocabularies_have_their_own_coverage(done):
    covered = [model(done / name / "tokenizer.model").trainer_spec.character_coverage for name in ("420", "500")]
    assert np.allclose(covered, [0.995, 0.9999])


def test_the_table_of_settings(done):
    table = experiment.checked("500", (done / "500" / "tokenizer.model").read_bytes())
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["byte fallback"] == ("yes", "yes", "256 pieces of a byte")
    assert rows["digits apart"] == ("yes", "yes", "0 with a digit beside anything")
    assert rows["dummy prefix"] == ("no", "no", "") and rows["longest piece"][:2] == ("32", "32")
    assert rows["character coverage"][:2] == ("0.9999", "0.9999") and rows["normalisation"][1] == "identity"
    wrong = {row[0]: row for row in experiment.checked("420", (done / "defaults/tokenizer.model").read_bytes()).rows}
    assert wrong["dummy prefix"][1:3] == ("no", "yes") and wrong["byte fallback"][3] == "0 pieces of a byte"


def test_what_is_done_is_not_done_again(done, config, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "train", lambda *args: pytest.fail("trained again"))
    (done / "500" / "result.json").unlink()
    experiment.run(config, done, stages=("texts", "tokenizers"))
    assert capsys.readouterr().out.count("done earlier") == 6 and (done / "500" / "result.json").is_file()


def test_mistakes(done, config, tmp_path):
    with pytest.raises(UserError, match="do the stage `texts` first"):
        experiment.run(config, tmp_path, stages=("tokenizers",))
    with pytest.raises(UserError, match="lacks the baseline 420"):
        experiment.run(config, tmp_path, stages=("report",))
    with pytest.raises(UserError, match="did you mean '500'"):
        experiment.run(config, done, only=("5000",))
    with pytest.raises(UserError, match=r"another training\.seed"):
        experiment.run(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1)), done)
    with pytest.raises(UserError, match=r"larger than this text supports: set vocab_size to \d+ or less"):
        experiment.run(dataclasses.replace(config, vocab_sizes=(420, 90_000)), done)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "gpt2"}, "baseline='gpt2' is not one of"),
        ({"published": ("qwen2",)}, "did you mean 'qwen'"),
        ({"vocab_sizes": (420, 420)}, "names one of them twice"),
        ({"vocab_sizes": ()}, "vocab_sizes is empty"),
        ({"settings": ("numbers",)}, "lacks baichuan2"),
        ({"settings_bytes": 0}, "must be positive"),
        ({"vocab_sizes": (0, 420)}, "must be positive"),
        ({"small_coverage": 2.0}, "must be in"),
        ({"training": TokenizerConfig(style="llama2")}, "these are baichuan2's settings"),
    ],
)
def test_settings_that_make_no_sense(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_configs_are_valid(name):
    found = runner.load_config(f"configs/tokenizer_report/{name}.py", TokenizerReportConfig)
    assert found.baseline == "mistral" and found.training.style == "baichuan2"
