"""Judged samples: KL divergence against its exact value, what referees see, and what is counted of them."""

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import judging
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.config import SamplingConfig
from tests.alignment import ppo_runs

QUESTIONS, SAMPLES, TEMPERATURE = 5, 4, 0.7
MESH = ppo_runs.mesh_of()
MODEL, REFERENCE = (ppo_runs.policy(MESH, key=key) for key in (0, 1))
PROMPTS = ppo_runs.questions(QUESTIONS)


def settings(samples=SAMPLES, new_tokens=ppo_runs.NEW_TOKENS, at_once=2):
    sampling = SamplingConfig(max_new_tokens=new_tokens, num_samples=samples, temperature=TEMPERATURE)
    return RolloutConfig(prompts=at_once, max_prompt_tokens=ppo_runs.PROMPT_TOKENS, sampling=sampling)


def judged(model=MODEL, reference=REFERENCE, prompts=PROMPTS, referees=None, **changes):
    given = {"a": ppo_runs.share_of_a} if referees is None else referees
    return judging.judge(model, reference, prompts, given, settings(**changes), None, MESH)


@pytest.fixture(scope="module")
def verdicts():
    return judged()


def logprobs(model, tokens):
    logits = np.asarray(models.logits(model.params, model.config, np.array([tokens])), np.float64)[0] / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_logprobs_are_those_of_each_response_alone(verdicts):
    for verdict in verdicts[:: SAMPLES + 1]:
        prompt = PROMPTS[verdict.prompt].tokens
        first, whole = len(prompt) - 1, [*prompt, *verdict.tokens]
        own, other = (
            sum(logprobs(model, whole)[first + i, token] for i, token in enumerate(verdict.tokens))
            for model in (MODEL, REFERENCE)
        )
        assert verdict.kl == pytest.approx(own - other, abs=1e-4)
        assert verdict.logprob == pytest.approx(other / len(verdict.tokens), abs=1e-4)


def test_the_mean_over_samples_is_the_divergence():
    """Of one token, whose divergence is a sum over the vocabulary."""
    found = np.array([each.kl for each in judged(prompts=PROMPTS[2:3], samples=512, new_tokens=1, at_once=1)])
    own, other = (logprobs(model, PROMPTS[2].tokens)[-1] for model in (MODEL, REFERENCE))
    exact = np.sum(np.exp(own) * (own - other))
    assert exact > 0.1 and abs(found.mean() - exact) < 3 * found.std() / np.sqrt(len(found))


def test_the_reference_itself_is_nowhere_else():
    assert {each.kl for each in judged(reference=MODEL)} == {0.0}


def test_every_prompt_is_judged_whatever_is_drawn_at_once(verdicts):
    assert [each.prompt for each in verdicts] == [i for i in range(QUESTIONS) for _ in range(SAMPLES)]
    other = judged(at_once=5)
    assert [each.tokens for each in other] == [each.tokens for each in verdicts]
    assert all(each.scores["a"] == np.float32(each.text.count("A") / len(each.tokens)) for each in verdicts)


def test_referees_see_the_prompt_of_each_response():
    def number(prompts, responses):
        return np.array([float(prompt[-1].content) for prompt in prompts], np.float32)

    assert all(each.scores["number"] == each.prompt for each in judged(referees={"number": number}))


def test_columns(verdicts):
    found = judging.columns(verdicts)
    assert found["kl"].shape == found["a"].shape == (QUESTIONS, SAMPLES)
    assert found["kl"][3, 2] == verdicts[3 * SAMPLES + 2].kl and found["length"][1, 0] == len(verdicts[SAMPLES].tokens)
    pairs = [pair for each in verdicts[:SAMPLES] for pair in zip(each.tokens, each.tokens[1:])]
    assert found["distinct_2"][0] == len(set(pairs)) / len(pairs) and 0 < found["self_bleu"][0] < 1
    assert "self_bleu" not in judging.columns(verdicts[::SAMPLES])


def test_files_are_read_back(verdicts, tmp_path):
    judging.write(tmp_path / "judged.jsonl", verdicts)
    assert judging.read(tmp_path / "judged.jsonl") == verdicts


def test_the_parameters_stay(verdicts):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((MODEL.params, REFERENCE.params)))
