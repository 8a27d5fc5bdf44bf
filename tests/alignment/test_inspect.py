"""What is shown of a sample: every token, the weights where they change, and colours by what is learned."""

import io

import numpy as np
from rich.console import Console

from llm_jax.alignment import inspect, sft
from llm_jax.alignment.config import ChatDataConfig
from llm_jax.alignment.conversations import Conversation
from llm_jax.alignment.sft import Sample
from llm_jax.tokenization.chat import Baichuan2, ChatML, Message
from tests.tokenization.chat_tokenizers import BYTE_LEVEL, Bytes

CONFIG = ChatDataConfig(sequence_length=1000)


def sample(template, *contents):
    messages = [Message(role, content) for role, content in zip(("user", "assistant") * 2, contents)]
    return sft.tokenize(Conversation(tuple(messages)), template, CONFIG)


def style_at(text, index):
    return next(str(span.style) for span in text.spans if span.start <= index < span.end)


def test_tokens_weights_and_colours():
    text = inspect.render(sample(ChatML(BYTE_LEVEL), "Who?\x1b[31m", "I am"), BYTE_LEVEL)
    assert text.plain == (
        "‹0›<|im_start|>system⏎\nYou are a helpful assistant.<|im_end|>⏎\n<|im_start|>user⏎\nWho?\\x1b[31m<|im_end|>⏎\n"
        "<|im_start|>assistant⏎\n‹1›I am<|im_end|>"
    )
    reply = text.plain.index("I am")
    assert style_at(text, reply) in inspect.LEARNED
    assert style_at(text, text.plain.rindex("<|im_end|>")) in [f"{style} bold" for style in inspect.LEARNED]
    assert style_at(text, text.plain.index("Who")) in inspect.READ
    assert style_at(text, reply - 2) == inspect.WEIGHT
    assert {str(span.style) for span in text.spans[-4:-1]} == set(inspect.LEARNED)  # two shades
    typed = inspect.render(sample(ChatML(BYTE_LEVEL), "a", "<|im_end|>"), BYTE_LEVEL)
    first, last = (typed.plain.index("<|im_end|>", typed.plain.index("‹1›")), typed.plain.rindex("<|im_end|>"))
    assert first < last and "bold" not in style_at(typed, first) and "bold" in style_at(typed, last)


def test_other_labels_weights_and_parts_of_characters():
    text = inspect.render(sample(Baichuan2(Bytes()), "a", "b", "c", "é画"), Bytes())
    assert text.plain == "‹0›<195>a<196>‹1›b<195>→</s>‹0›c<196>‹1›é画</s>"
    assert style_at(text, text.plain.index("→")) == inspect.RELABELLED
    parts = np.array([300 + 0xE7, 300 + 0x94, 300 + 0xBB, 300, 300 + 0xE7])
    halves = Sample(parts, parts, np.array([0, 0, 0.5, 0.5, 0.5], np.float32))
    assert inspect.render(halves, Bytes()).plain == "‹0›\\xe7\\x94‹0.5›\\xbb\\x00\\xe7"


def test_showing_samples():
    out = io.StringIO()
    samples = [sample(ChatML(Bytes()), "a" * 300, "[bold]b[/bold]"), sample(ChatML(Bytes()), "c", "d")]
    samples[1] = samples[1]._replace(rounds_left_out=2)
    inspect.show(samples, Bytes(), Console(file=out, width=100, color_system="standard", force_terminal=True))
    printed = out.getvalue()
    assert "\x1b[" in printed
    out.seek(0), out.truncate()
    inspect.show(samples, Bytes(), Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert "weight of the loss" in lines[0]
    count = len(samples[0].tokens)
    assert lines[1].startswith(f"sample 1: {count} tokens, 15 with a loss ")
    assert "‹1›[bold]b[/bold]<|im_end|>" in lines and "a" * 300 in out.getvalue()
    assert "2 with a loss, 2 rounds left out at the end" in out.getvalue()
