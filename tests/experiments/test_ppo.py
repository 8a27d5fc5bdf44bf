"""The experiment as its users run it: prompts from a file, rewards by name, the reports' settings, and mistakes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs.ppo import papers, small
from experiments import ppo, runner
from llm_jax import config as config_lib
from llm_jax.alignment import finetune, reward
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    CriticConfig,
    PpoConfig,
    PromptDataConfig,
    RewardShapingConfig,
    RolloutConfig,
)
from llm_jax.alignment.rewards import Response
from llm_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig, SamplingConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.tokenization.chat import Message
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint, metrics
from tests.alignment import base_models
from tests.processes import assert_same_numbers, run_together

REWARD = f"{__name__}:length"


def length(prompts, responses):
    assert all(prompt[0].role == "user" for prompt in prompts)
    return np.array([response.tokens / 4 for response in responses], np.float32)


def count(prompts, responses):
    return [response.tokens for response in responses]


def hundreds(prompts, responses):
    return np.full(len(responses), 100.0, np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory):
    """A random one of the base."""

    folder = tmp_path_factory.mktemp("reward") / "model"
    config = FineTuneConfig(model=str(base), mesh=MeshConfig(data=1, replica=1))
    mesh = finetune.build_mesh(FineTuneConfig(model=str(base)))
    model = reward.from_language_model(finetune.load(config, mesh), mesh, jax.random.key(3))
    finetune.write_companions(model, folder)
    checkpoint.save_model(folder, model.config, model.params)
    reward.save_settings(folder, "none", "last", 0.0)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    words = base_models.WORDS
    records = [{"prompt": f"{words[i % 3]} {words[i // 3 % 3]} {i}", "unsafe": i % 5 == 0} for i in range(40)]
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "one " * 60}]))
    return file


def settings(base, asked, **changes):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
    values = {
        "training": FineTuneConfig(
            model=str(base), steps=2, log_every=1, eval_every=2, optimizer=optimizer,
            checkpoint=CheckpointConfig(every_steps=2, keep_last=1),
        ),
        "prompts": PromptDataConfig(path=str(asked), template="none", max_tokens=24, holdout_fraction=0.25),
        "rollout": RolloutConfig(prompts=8, max_prompt_tokens=24, sampling=SamplingConfig(max_new_tokens=4)),
        "reward": REWARD,
        "minibatch_size": 8,
        "eval_prompts": 8,
        "critic": CriticConfig(optimizer=optimizer),
    }  # fmt: skip
    return PpoConfig(**values | changes)


def test_a_policy_is_trained_and_its_folder_is_a_model(base, asked, tmp_path, capsys):
    ppo.run(settings(base, asked), tmp_path)
    said = capsys.readouterr().out
    assert "of them tagged unsafe" in said and "PromptDataConfig.max_tokens" in said  # of the one that is too long
    assert "reference" in said and "together" in said
    assert [record["step"] for record in metrics.read(tmp_path, "train")] == [1, 2]
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["kl"] == 0 and first["record"].startswith("prompts.jsonl:")
    assert pretrained.load(tmp_path).config.architecture() == base_models.MODEL.architecture()
    with pytest.raises(UserError, match=r"another config \(epochs 1 -> 2\)"):
        ppo.run(settings(base, asked, epochs=2), tmp_path)


def test_rewards_and_critic_of_reward_models(base, asked, reward_model, tmp_path, capsys):
    name = str(reward_model)
    critic = CriticConfig(model=name, optimizer=settings(base, asked).critic.optimizer)
    ppo.run(settings(base, asked, reward=name, reward_weights="int8", safety_reward=REWARD, critic=critic), tmp_path)
    assert "reward models" in capsys.readouterr().out
    assert [record["step"] for record in metrics.read(tmp_path, "train")] == [1, 2]


def test_a_reward_model_of_another_tokenizer_reads_texts_and_is_no_critic(base, asked, reward_model, tmp_path):
    other = shutil.copytree(reward_model, tmp_path / "other")
    words = train_on_texts(["three two one, here and there\n"] * 9, TokenizerConfig(vocab_size=279))
    (other / "tokenizer.model").write_bytes(words)
    config = settings(base, asked, reward=str(other))
    same, model = (
        ppo.load_reward(each, "reward", finetune.build_mesh(config.training))
        for each in (settings(base, asked, reward=str(reward_model)), config)
    )
    said = Response("three two", True, 3)
    assert len(model.encoder((), said.text)) != len(same.encoder((), said.text))
    tokenizer = model.encoder.tokenizer
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(said.text)], np.int32)
    np.testing.assert_array_equal(model([()], [said]), model.score([ids]))
    with pytest.raises(UserError, match="the critic has another tokenizer than the policy"):
        ppo.run(dataclasses.replace(config, critic=CriticConfig(model=str(other))), tmp_path / "run")


def test_a_reward_model_that_waits_in_the_hosts_memory_says_the_same(base, asked, reward_model):
    config = settings(base, asked, reward=str(reward_model), reward_weights="int8")
    mesh = finetune.build_mesh(config.training)
    asked_of, said = [(Message("user", "one"),)] * 2, [Response("two three", True, 3), Response("one", True, 2)]
    found = {}
    for offloaded, kind in ((False, "device"), (True, "pinned_host")):
        model = ppo.load_reward(dataclasses.replace(config, offload=offloaded), "reward", mesh)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(model.params)} == {kind}
        found[offloaded] = model(asked_of, said)
    np.testing.assert_array_equal(found[True], found[False])
    assert found[True][0] != found[True][1]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(base, asked, reward_model, tmp_path):
    """Held-out prompts fill one batch and a part of another; one reward is a model's, whose rows they share, too."""
    rollout = RolloutConfig(prompts=8, max_prompt_tokens=24, sampling=SamplingConfig(max_new_tokens=4, num_samples=2))
    rewards = {"reward": str(reward_model), "safety_reward": REWARD}
    config = settings(base, asked, rollout=rollout, eval_prompts=10, samples=6, **rewards)
    ppo.run(config, tmp_path / "one")
    config_lib.save(config, tmp_path / "config.json")
    run_together(["-m", "experiments.ppo", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/two"])
    assert_same_numbers(tmp_path / "two", tmp_path / "one")
    one, two = ((tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert len(one) == len(two) == 2 * 6 * 2
    for expected, found in zip(map(json.loads, one), map(json.loads, two)):
        for name in ("score", "kl"):
            assert found.pop(name) == pytest.approx(expected.pop(name), abs=1e-4)
        assert found == expected
    one, two = (jax.device_get(pretrained.load(tmp_path / name).params) for name in ("one", "two"))
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, atol=1e-4), two, one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": ""}, "set --config.reward to the folder of a reward model"),
        ({"reward": "no.such:thing"}, "config.reward=no.such:thing: ModuleNotFoundError: No module named 'no'"),
        ({"reward": "configs.ppo.small:__name__"}, "that is 'configs.ppo.small', no function"),
        ({"safety_reward": f"{__name__}:count"}, "the reward 'count' returned int64, in which fractions would be lost"),
        ({"reward": f"{__name__}:nothing"}, "has no attribute 'nothing'"),
        ({"reward": "runs/nowhere"}, "runs/nowhere: there is no such folder of a reward model"),
        ({"prompts": PromptDataConfig(template="none", max_tokens=24)}, "PromptDataConfig.path is not set"),
        (
            {"rollout": RolloutConfig(prompts=8, max_prompt_tokens=24, sampling=SamplingConfig(max_new_tokens=60))},
            r"prompt \d+ \(prompts.jsonl:\d+\) has \d+ tokens: with 60 new ones it passes the room of 64",
        ),
        (
            {"rewards": RewardShapingConfig(logit=True), "reward": f"{__name__}:hundreds"},
            r"logit=True is of probabilities, and the reward returned \[100.0\]",
        ),
    ],
)
def test_mistakes_take_a_line(base, asked, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ppo.run(settings(base, asked, **changes), tmp_path)


def test_a_reward_model_is_no_policy(asked, reward_model, tmp_path):
    with pytest.raises(UserError, match="is a reward model, which writes nothing: name a language model"):
        ppo.run(settings(reward_model, asked), tmp_path)


def preset(name):
    return config_lib.from_config_dict(PpoConfig, papers.get_config(name))


def test_the_reports_settings():
    """Facts of the reports, once more and by hand."""
    llama2, large, baichuan2, qwen = map(preset, ("llama2", "llama2_large", "baichuan2", "qwen"))
    assert llama2.rollout.prompts * llama2.rollout.sampling.num_samples == 512
    assert (llama2.minibatch_size, llama2.epochs, llama2.loss.clip) == (64, 1, 0.2)
    assert (llama2.kl.coefficient, large.kl.coefficient) == (0.01, 0.005)
    assert llama2.rewards.normalization == "whiten" and llama2.safety_threshold == 0.15
    optimizer = llama2.training.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-5)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.learning_rate) == (0.1, 1.0, 1e-6)
    assert 200 <= llama2.training.steps <= 400 and optimizer.schedule == "constant"
    assert (baichuan2.critic.warmup_iterations, baichuan2.training.steps, baichuan2.loss.clip) == (20, 350, 0.1)
    assert (baichuan2.kl.coefficient, baichuan2.kl.end, baichuan2.kl.iterations) == (0.2, 0.005, 350)
    assert (baichuan2.training.optimizer.learning_rate, baichuan2.training.optimizer.clip_norm) == (5e-6, 0.5)
    assert (qwen.critic.warmup_iterations, qwen.rollout.sampling.num_samples, qwen.kl.coefficient) == (50, 2, 0.04)
    assert (qwen.training.optimizer.learning_rate, qwen.critic.optimizer.learning_rate) == (1e-6, 5e-6)
    assert (qwen.loss.value_clip, qwen.rollout.sampling.top_p) == (0.15, 0.9)
    assert qwen.rewards.normalization == "running_mean"


def test_small_configs_differ_in_their_baselines():
    found = {kind: config_lib.from_config_dict(PpoConfig, small.get_config(kind)) for kind in ("gae", "grpo", "rloo")}
    assert {kind: config.advantage.kind for kind, config in found.items()} == {kind: kind for kind in found}
    sizes = {config.rollout.prompts * config.rollout.sampling.num_samples for config in found.values()}
    assert sizes == {64}
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        small.get_config("gpro")


def test_help_and_overrides():
    argv = ["ppo", "--config=configs/ppo/small.py:rloo", "--config.kl.coefficient=0.1"]
    config, _ = runner.parse(argv, PpoConfig, "configs/ppo/small.py", "runs/ppo")
    assert config.kl.coefficient == 0.1
    assert config == dataclasses.replace(config)
