"""The ablation as a person runs it, on made-up texts: three sets without the held-out documents, and fair judgement."""

import dataclasses
import json
import math
import re
import shutil

import jax.numpy as jnp
import pyarrow.parquet as pq
import pytest

from experiments import corpus_ablation
from experiments.corpus_ablation import AblationConfig
from llm_jax.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from llm_jax.data import parquet
from llm_jax.data.planted_texts import units
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages.contamination import ContaminationConfig
from llm_jax.data.stages.language import LanguageConfig
from llm_jax.data.stages.lines import LinesConfig
from llm_jax.data.stages.quality import QualityConfig
from llm_jax.data.stages.semantic import SemanticConfig
from llm_jax.errors import UserError
from llm_jax.evaluation import perplexity
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import checkpoint
from tests.data import made_up


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Stories, every third of them twice, once with a word more; and all end with the same line."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, row in enumerate(made_up.documents(90)):
        text = f"title {number}\n{row[5]}\n\nThis line is at the end of too many documents of this corpus."
        with (folder / f"{row[1]}.jsonl").open("a") as file:
            for copy in (text, f"{text} more")[: 1 + (number % 3 == 0)]:
                file.write(json.dumps({"text": copy}) + "\n")
    model = ModelConfig(
        vocab_size=640, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, ffn_size=24,
        max_length=64,
    )  # fmt: skip
    return AblationConfig(
        prepare=PrepareConfig(
            path=str(folder),
            holdout_fraction=0.2,
            workers=1,
            language=LanguageConfig(enabled=False),
            quality=QualityConfig(enabled=False),
            semantic=SemanticConfig(enabled=False),
            lines=LinesConfig(documents=20),
            contamination=ContaminationConfig(sets=(), common=30),
        ),
        tokenizer=TokenizerConfig(vocab_size=640, workers=1),
        train=TrainConfig(
            steps=3,
            eval_every=0,
            eval_batches=1,
            model=model,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            data=DataConfig(sequence_length=64, batch_size=4),
            checkpoint=CheckpointConfig(every_steps=3),
        ),
        seeds=(0, 1),
        heldout_bytes=2000,
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation") / "run"
    corpus_ablation.run(config, folder)
    return folder


def kept(workdir, arm):
    last = sorted((workdir / arm / "stages").iterdir())[-1]
    return [text for path in parquet.files(last / "kept") for text in pq.read_table(path)["text"].to_pylist()]


def grams(text, width=13):
    """Of single sentences: where one was cut out, those beside it meet by chance."""
    found = [units(sentence) for sentence in re.split(r"(?<=[.])\s", text)]
    return {tuple(each[i : i + width]) for each in found for i in range(len(each) - width + 1)}


def test_no_training_set_has_anything_of_the_held_out_documents(workdir):
    heldout = [json.loads(line)["text"] for path in (workdir / "heldout").iterdir() for line in path.open()]
    english = set().union(*(grams(text) for text in heldout if text.isascii()))
    assert len(heldout) > 20 and len(english) > 500
    for arm in corpus_ablation.ARMS:
        assert not english & set().union(*(grams(text) for text in kept(workdir, arm)))


def test_the_sets_differ_as_they_should(workdir):
    raw, deduplicated, filtered = (kept(workdir, arm) for arm in corpus_ablation.ARMS)
    line = "This line is at the end"
    assert sum(line in text for text in raw) == len(raw) > len(deduplicated) >= len(filtered)
    assert not any(line in text for text in [*deduplicated, *filtered])
    copies = [text for text in raw if text.endswith(" more") and text.removesuffix(" more") in raw]
    assert copies and not any(
        text.endswith(" more") and text.removesuffix(" more") in deduplicated for text in deduplicated
    )
    report = json.loads((workdir / "report.json").read_text())
    sizes = [row["bytes"] for row in report["sets"].values()]
    assert sizes == sorted(sizes, reverse=True) and all(row["cut"] > 0 for row in report["sets"].values())


def test_runs_of_a_seed_differ_in_their_data_alone(config, workdir):
    for seed in config.seeds:
        saved = [
            json.loads((workdir / arm / f"seed_{seed}" / "config.json").read_text()) for arm in corpus_ablation.ARMS
        ]
        for run in saved:
            assert run["data"].pop("dataset") and run["seed"] == run["data"]["seed"] == seed
        assert saved[0] == saved[1] == saved[2]


def test_bits_are_those_of_the_texts_alone(config, workdir, tmp_path):
    """Of one short document a source, against its own tokens' likelihoods."""
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "en.jsonl").write_text(json.dumps({"text": "a cat by the river"}))
    run = workdir / "raw" / "seed_1"
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / corpus_ablation.RESULT).unlink()
    found = corpus_ablation.judged(config, tmp_path, copy)
    model, params, _ = checkpoint.load_model(run)
    tokenizer = tokenizers.load(run)
    ids = jnp.array([[tokenizer.bos_id, *tokenizer.encode_batch(["a cat by the river"])[0], tokenizer.eos_id]])
    nats = float(perplexity.token_nats(params, model, ids[:, :-1], ids[:, 1:]).sum())
    assert found["en"] == found[""] == pytest.approx(nats / math.log(2) / 18, rel=1e-5)


def test_a_second_run_does_nothing_again_and_another_config_is_refused(config, workdir, capsys):
    report = (workdir / "report.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.parquet")}
    corpus_ablation.run(config, workdir)
    assert (workdir / "report.md").read_text() == report and "±" in report
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.parquet")} == times
    with pytest.raises(UserError, match=r"another .*steps"):
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
        corpus_ablation.run(changed, workdir)


def test_estimates_have_standard_errors():
    assert corpus_ablation.estimate([1.0, 2.0, 3.0], ".2f") == "2.00 ± 0.5774"
    assert corpus_ablation.estimate([1.5], "+.1f") == "+1.5"
    with pytest.raises(UserError, match="name one seed"):
        AblationConfig(seeds=())
