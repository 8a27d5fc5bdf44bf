"""The experiment on a small corpus of one's own: its files, its report, and the mistakes one can make."""

import json

import pytest

from experiments import runner, train_tokenizer
from llm_jax import config as config_lib
from llm_jax.config import CorpusConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer as tokenizers


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            f"第{i}篇：白日依山尽，黄河入海流。\n\ndef f{i}(x):\n    return x ** {i}\n" * 3
        )
    return folder


def run(corpus, workdir, **options) -> None:
    options = {"vocab_size": 320, "corpus": CorpusConfig(path=str(corpus)), **options}
    train_tokenizer.run(TokenizerConfig(**options), workdir)


def test_it_writes_a_tokenizer_and_its_report(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "run")
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer.model")
    assert tokenizer.vocab_size == 320
    *_, everything = json.loads((tmp_path / "run" / "tokenizer_report.json").read_text())
    assert everything["exact"] == everything["documents"] > 0
    assert everything["bytes_per_token"] == everything["bytes"] / everything["tokens"]
    assert "bytes/token" in capsys.readouterr().out


def test_the_report_reads_documents_spread_over_the_sample():
    documents = [train_tokenizer.Document("mine", "en", str(i) * 10) for i in range(10)]
    assert train_tokenizer._spread(documents, 25) == documents[::4]
    assert train_tokenizer._spread(documents, 10**6) == documents


def test_an_impossible_vocabulary_leaves_no_tokenizer(corpus, tmp_path):
    with pytest.raises(UserError, match="larger than this text supports"):
        run(corpus, tmp_path / "run", vocab_size=100_000)
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "run")


@pytest.mark.parametrize("name", ["demo", "baichuan2", "llama2", "own_text"])
def test_the_configs_are_valid(name):
    config = runner.load_config(f"configs/tokenizer/{name}.py", TokenizerConfig)
    assert config_lib.from_config_dict(TokenizerConfig, config_lib.to_config_dict(config)) == config
