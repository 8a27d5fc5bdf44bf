"""The experiment as its users run it: fine-tuning, adapters, inspection, and the mistakes one can make."""

import dataclasses
import json

import pytest

from configs.sft import papers
from experiments import runner, samples, sft
from llm_jax import config as config_lib
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig, SftConfig
from llm_jax.config import LoraConfig, MeshConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import metrics
from tests.alignment import base_models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Sixty conversations in which every reply is "three one"."""
    file = tmp_path_factory.mktemp("data") / "talk.jsonl"
    with file.open("w") as lines:
        for number in range(60):
            asked = " ".join(base_models.WORDS[number // 3**place % 3] for place in range(4))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "three one"}]
            lines.write(json.dumps({"messages": messages}) + "\n")
        lines.write('{"messages": [{"role": "user", "content": "and?"}]}\n')
    return file


def settings(base, talk, **changes):
    training = FineTuneConfig(
        model=str(base),
        steps=6,
        eval_every=3,
        log_every=3,
        optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0),
    )
    data = ChatDataConfig(path=str(talk), template="llama2", sequence_length=48, batch_size=8, holdout_fraction=0.1)
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    return dataclasses.replace(SftConfig(training=training, data=data, samples=1, sampling=sampling), **changes)


def test_a_model_learns_to_reply_and_its_folder_can_be_used(base, talk, tmp_path):
    sft.run(settings(base, talk), tmp_path)
    losses = [record["loss/talk"] for record in metrics.read(tmp_path, "heldout")]
    assert losses[-1] < losses[0] - 0.5
    said = [json.loads(line) for line in (tmp_path / samples.FILE).read_text().splitlines()]
    assert [(sample["step"], sample["record"]) for sample in said] == [(step, said[0]["record"]) for step in (3, 6)]
    loaded = pretrained.load(tmp_path / "best")
    assert loaded.config.architecture() == base_models.MODEL.architecture()


def test_what_was_said_at_steps_that_are_done_again_is_said_once(base, tmp_path):
    mesh = mesh_lib.build(MeshConfig())
    model = pretrained.load(base, mesh=mesh)
    asked, says = [samples.Asked("a:1", "one", [5])], samples.Says([], str)
    for step, expected in ((3, [3]), (6, [3, 6]), (6, [3, 6]), (3, [3])):
        samples.append_samples(
            tmp_path, step, asked, says, SamplingConfig(max_new_tokens=1), model.params, model.config, mesh
        )
        said = (tmp_path / samples.FILE).read_text().splitlines()
        assert [json.loads(line)["step"] for line in said] == expected


def test_adapters(base, talk, tmp_path):
    config = settings(base, talk)
    training = dataclasses.replace(config.training, lora=LoraConfig(rank=2), quantize="int8", keep_best=False)
    sft.run(dataclasses.replace(config, training=training), tmp_path)
    losses = [record["loss"] for record in metrics.read(tmp_path, "heldout")]
    assert losses[-1] < losses[0]
    assert pretrained.load(tmp_path).config.quantization == "none"


def test_inspection_shows_what_is_learned(base, talk, capsys):
    sft.show(settings(base, talk), 2)
    shown = capsys.readouterr().out
    assert shown.count("three one") == 2 and "[/INST]" in shown and "sample 2" in shown


@pytest.mark.parametrize("name", papers.PRESETS)
def test_presets_are_configs_with_what_the_reports_say(name):
    config = config_lib.from_config_dict(SftConfig, papers.get_config(name))
    template = {"llama2": "llama2", "baichuan2": "baichuan2"}.get(name, "chatml")
    assert config.data.template == template and config.data.supervise == "replies"
    if name == "qwen":
        rate, steps, warmup = config.training.optimizer.learning_rate, config.training.steps, config.training.optimizer
        assert (rate, steps, warmup.warmup_steps, config.training.dropout_rate) == (2e-6, 4000, 1430, 0.1)
    if name == "llama2":
        assert (config.training.optimizer.learning_rate, config.training.epochs, config.data.batch_size) == (
            2e-5,
            2.0,
            64,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, template="chatml")), "<|im_start|>"),
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, path="nowhere.jsonl")), "nowhere.jsonl"),
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=512)), "lower ChatDataConfig"),
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, sequence_length=128)), "max_length=64"),
    ],
    ids=["template", "path", "batch", "length"],
)
def test_mistakes_are_one_line(base, talk, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        sft.run(change(settings(base, talk)), tmp_path)
    assert message in str(error.value) and "\n" not in runner.describe(error.value)


def test_pretraining_data_needs_a_share():
    with pytest.raises(UserError, match="go together"):
        SftConfig(pretraining_fraction=0.5)
