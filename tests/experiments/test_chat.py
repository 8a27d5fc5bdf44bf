"""The chat over a model of random parameters: what it shows the model, what it prints, and its commands."""

import dataclasses
import io
import json
import sys

import jax
import pytest

from experiments import chat as experiment
from experiments import runner
from experiments.chat import ChatConfig, Conversation
from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.sampling.generate import Generation, generate
from llm_jax.tokenization.chat import Llama2, Message
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.train import train_on_texts

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=16, max_length=128,
    init_std=0.5,
)  # fmt: skip
CONFIG = ChatConfig(template="llama2", max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    tokenizer = SentencePieceTokenizer(
        train_on_texts(["one two [INST] three 一二三\n" * 9], TokenizerConfig(vocab_size=290, style="llama2"))
    )
    return Pretrained(MODEL, models.init(MODEL, jax.random.key(0)), tokenizer, "")


@pytest.fixture
def talk(model, monkeypatch, tmp_path, capsys):
    """Runs a chat on some lines; returns what it prints, what it notes, and the conversation."""
    monkeypatch.setattr(pretrained, "load_to_generate", lambda path, **options: model)

    def run(lines, config=CONFIG):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        conversation = experiment.run(config, tmp_path, "a model")
        printed = capsys.readouterr()
        return printed.out, printed.err, conversation

    return run


def reply(model, messages, max_new_tokens=8):
    """The greedy reply by `generate` alone."""
    prompt = Llama2(model.tokenizer).encode([Message(*message) for message in messages])
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    (generation,) = generate(model.params, MODEL, [prompt], sampling, stop_ids=[2])
    return model.tokenizer.decode(i for i in generation.tokens if i < model.tokenizer.vocab_size)


def test_every_reply_follows_the_whole_conversation(model, talk):
    first = reply(model, [("system", "three"), ("user", "one")])
    second = reply(model, [("system", "three"), ("user", "one"), ("assistant", first), ("user", " two")])
    out, _, conversation = talk(["/system three", "one", "", " two"])
    shown = [experiment.visible(text) for text in (first, second)]
    assert out == "".join(f"{text}\n" for text in shown)
    assert [message.content for message in conversation.messages] == ["three", "one", first, " two", second]


def test_one_prompt(model, talk, tmp_path, capsys):
    conversation = experiment.run(CONFIG, tmp_path, "a model", "one")
    assert conversation.messages[-1].content == reply(model, [("user", "one")])
    assert capsys.readouterr().out == experiment.visible(conversation.messages[-1].content) + "\n"


def test_reset_forgets_all_but_the_instructions(model, talk):
    _, _, conversation = talk(["one", "/reset", "two"], dataclasses.replace(CONFIG, system="three"))
    assert conversation.messages[1:] == [
        Message("user", "two"),
        Message("assistant", reply(model, [("system", "three"), ("user", "two")])),
    ]
    assert talk(["/system", "one"])[2].messages[0].role == "user"


def test_saving_adds_a_line(talk, tmp_path):
    _, err, conversation = talk(["一", "/save", f"/save {tmp_path}/new/talk.jsonl", "two", "/save", "/quit", "three"])
    lines = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [len(line["messages"]) for line in lines] == [2, 4]
    assert lines[-1]["messages"] == [dataclasses.asdict(message) for message in conversation.messages]
    assert lines[0]["messages"][0] == {"role": "user", "content": "一"}
    assert json.loads((tmp_path / "new" / "talk.jsonl").read_text()) == lines[0]
    assert f"saved to {tmp_path / 'chat.jsonl'}\n" in err
    assert not list(tmp_path.rglob("*.partial"))


def test_the_oldest_rounds_are_left_out_when_the_context_is_full(model, talk):
    lines = ["one two three " * 2] * 4
    _, err, conversation = talk(lines, dataclasses.replace(CONFIG, max_context=96))
    assert len(conversation.messages) == 8
    assert "oldest rounds that the model no longer sees: 1]" in err
    kept = [(message.role, message.content) for message in conversation.messages[:-1]]
    replies = {reply(model, kept[2 * i :]) for i in (1, 2, 3)}
    assert conversation.messages[-1].content in replies


def test_a_reply_of_no_more_than_half_the_context(talk):
    out, err, _ = talk(["one"], dataclasses.replace(CONFIG, max_new_tokens=512, max_context=32))
    assert out and "error" not in err


def test_mistakes_end_a_file_of_messages(talk):
    for lines, message in (
        (["one " * 200], "the last message needs .* tokens, and there is room for 120"),
        (["[/INST]"], "message 1 holds"),
        (["/sing"], "unknown command /sing: /help lists those there are"),
        (["/save"], "there is nothing to save yet"),
        (["one", "/save /proc/nothing/here"], "cannot save to /proc/nothing/here"),
    ):
        with pytest.raises(UserError, match=message):
            talk(lines)


def typing(monkeypatch, *lines):
    """A terminal at which somebody types; an exception among the lines is raised."""
    remaining = iter([*lines, EOFError])

    def read(prompt):
        line = next(remaining)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def test_mistakes_at_a_terminal_are_said_and_forgotten(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pretrained, "load_to_generate", lambda path, **options: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    typing(monkeypatch, "/sing", "one " * 200, "one", "/help")
    conversation = experiment.run(CONFIG, tmp_path, "a model")
    assert [message.role for message in conversation.messages] == ["user", "assistant"]
    err = capsys.readouterr().err
    assert "error: unknown command /sing" in err and "error: the last message needs" in err and "/reset" in err


def test_ctrl_c_stops_a_reply_and_then_leaves(model, monkeypatch, tmp_path, capsys):
    words = model.tokenizer.encode("two three")

    def interrupted(*arguments, on_tokens, **options):
        on_tokens(0, words)
        words.clear()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "load_to_generate", lambda path, **options: model)
    monkeypatch.setattr(experiment, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    typing(monkeypatch, "one", "again", KeyboardInterrupt, "never read")
    conversation = experiment.run(CONFIG, tmp_path, "a model")
    assert conversation.messages == [Message("user", "one"), Message("assistant", "two three")]
    printed = capsys.readouterr()
    assert printed.out.startswith("two three\n") and printed.err.count("[stopped]") == 2


def test_text_comes_while_tokens_are_drawn(model, monkeypatch):
    order = []

    def slow(*arguments, on_tokens, **options):
        for i in model.tokenizer.encode("two three"):
            order.append("drawn")
            on_tokens(0, [i])
        return [Generation([], [], "stop")]

    monkeypatch.setattr(experiment, "generate", slow)
    answer = experiment.begin(CONFIG, model).ask("one", order.append)
    texts = [i for i, event in enumerate(order) if event not in ("drawn", "")]
    assert answer.text == "two three" and len(texts) > 1 and texts[0] < len(order) - 2


def test_every_reply_has_random_numbers_of_its_own(model):
    conversation = experiment.begin(dataclasses.replace(CONFIG, temperature=2.0), model)
    first = conversation.ask("one", lambda text: None)
    conversation.reset()
    assert conversation.ask("one", lambda text: None) == first
    conversation.ask("one", lambda text: None)
    assert conversation.messages[1].content != conversation.messages[3].content


def test_what_is_not_set_is_the_formats(model):
    def sampling(config):
        return experiment.begin(config, model)._sampling

    unset = sampling(ChatConfig(template="llama2"))
    assert (unset.temperature, unset.top_k, unset.top_p, unset.repetition_penalty) == (0.6, 0, 0.9, 1.0)
    assert unset.max_new_tokens == 64
    given = ChatConfig(template="llama2", temperature=0.0, top_k=3, top_p=1.0, repetition_penalty=1.2, max_context=20)
    chosen = sampling(given)
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.repetition_penalty) == (0.0, 3, 1.0, 1.2)
    assert (chosen.max_new_tokens, chosen.max_context) == (10, 20)


@pytest.mark.parametrize("change", [{"temperature": -2.0}, {"temperature": -0.5}, {"top_k": -5}])
def test_numbers_below_those_that_mean_something(change):
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"^{name}={value} must be 0 or more, or -1"):
        ChatConfig(**change)


def test_a_model_cannot_do_things_to_the_terminal():
    assert experiment.visible("a\x1b[2Jb\n\tc\x07\r\x9b") == "a[2Jb\n\tc"


@pytest.mark.parametrize("name", ["default", "greedy"])
def test_the_configs_are_valid(name):
    runner.load_config(f"configs/chat/{name}.py", ChatConfig)


def test_a_conversation_begins_with_its_instructions(model):
    template = Llama2(model.tokenizer)
    assert Conversation(model, template, template.sampling, "three").messages == [Message("system", "three")]


@pytest.mark.slow
def test_a_pretrained_model_knows_the_capital_of_france(tmp_path, capsys):
    config = runner.load_config("configs/chat/greedy.py", ChatConfig)
    experiment.run(config, tmp_path, "smollm2", "What is the capital of France?")
    assert "Paris" in capsys.readouterr().out
