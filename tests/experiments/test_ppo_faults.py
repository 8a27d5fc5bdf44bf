"""The runs with one thing wrong each: what is wrong in them, their figure, and that all are one command."""

import dataclasses

import numpy as np

from configs.ppo import faults
from experiments import ppo_faults
from llm_jax import config as config_lib
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.rewards import Response
from tests.alignment import base_models


def test_the_share_of_a_letter():
    said = [Response("eel"), Response(""), Response("no")]
    np.testing.assert_allclose(ppo_faults.share_of_e([(), (), ()], said), [2 / 3, 0, 0])
    assert ppo_faults.share_of_e([], []).dtype == np.float32


def test_all_runs_their_figure_and_their_table(tmp_path):
    config = config_lib.from_config_dict(PpoConfig, faults.get_config())
    base = base_models.make(tmp_path / "base")
    short = dataclasses.replace(config.rollout.sampling, max_new_tokens=4)
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, model=str(base), steps=2),
        prompts=dataclasses.replace(config.prompts, max_tokens=40),
        rollout=dataclasses.replace(config.rollout, prompts=4, max_prompt_tokens=40, sampling=short),
        minibatch_size=8,
        eval_prompts=4,
    )
    different = [ppo_faults.variants(config)[name] for name in ppo_faults.variants(config)]
    assert len({repr(each) for each in different}) == len(different) == 5
    ppo_faults.run(config, tmp_path / "runs")
    assert (tmp_path / "runs" / "curves.png").stat().st_size > 10_000
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(ppo_faults.variants(config))
    assert len(lines[2].split("|")) == len(ppo_faults.PANELS) + 3
