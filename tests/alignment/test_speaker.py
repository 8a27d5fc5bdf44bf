"""A model that talks: batches do not matter, and what the limit cuts off is left out."""

import dataclasses

import pytest

from llm_jax.alignment import finetune
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.speaker import Speaker, whole_sentences
from llm_jax.config import SamplingConfig
from llm_jax.interop import pretrained
from llm_jax.tokenization.chat import Llama2, Message
from tests.alignment import base_models


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Hello there. This is", "Hello there."),
        ("No end here", "No end here"),
        ("1. Nectar\n2. Sting", "1. Nectar"),
        ("A? B! C", "A? B!"),
        ('He said "no." And', 'He said "no."'),
        ("It is 3.5 kilograms", "It is 3.5 kilograms"),
        ("你好！再见。我", "你好！再见。"),
        ("", ""),
    ],
)
def test_only_whole_sentences_are_kept(text, whole):
    assert whole_sentences(text) == whole


def test_replies_do_not_depend_on_the_batch(tmp_path):
    mesh = finetune.build_mesh(FineTuneConfig())
    model = pretrained.load(base_models.make(tmp_path / "model"), mesh=mesh)
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, seed=3)
    told: list[int] = []
    speaker = Speaker(model, Llama2(model.tokenizer), sampling, mesh, 4, told.append)
    dialogues = [[Message("user", text)] for text in ("one", "two one", "three", "two", "one one one", "three two")]
    together = speaker.reply(dialogues)
    assert len(set(together)) > 3 and told == [4, 2]
    assert dataclasses.replace(speaker, batch_size=2).reply(dialogues[::-1]) == together[::-1]
