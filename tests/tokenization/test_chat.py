"""Chat templates against hand-written token strings and transformers, and against people who type control tokens."""

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.errors import UserError
from llm_jax.tokenization import chat, template_sandbox
from llm_jax.tokenization.chat import Baichuan2, ChatML, JinjaTemplate, Llama2, Message
from llm_jax.tokenization.tokenizer_json import JsonTokenizer
from tests.tokenization import chat_tokenizers
from tests.tokenization.chat_tokenizers import BYTE_FALLBACK, BYTE_LEVEL, GOLDEN, golden_tokenizer

SYSTEM, USER, REPLY, AGAIN = (
    Message("system", "Be brief."),
    Message("user", " Who? "),
    Message("assistant", "\tI am. "),
    Message("user", "\n\nWhy"),
)
ONE_ROUND = [SYSTEM, USER]
TWO_ROUNDS = [SYSTEM, USER, REPLY, AGAIN]


@pytest.fixture(scope="module")
def sentencepieces():
    return chat_tokenizers.sentencepieces()


def shown(template, ids):
    """The ids as text, with the names of control tokens in their places."""
    tokenizer = template.tokenizer
    names = {i: name.encode() for name, i in tokenizer.special_ids.items()}
    before = tokenizer.encode("x")
    start = len(tokenizer.decode_bytes(before))
    return b"".join(names.get(i) or tokenizer.decode_bytes([*before, i])[start:] for i in ids).decode()


def supervised(template, messages):
    return [i for segment in template.segments(messages, False) if segment.supervised for i in segment.ids]


# The tokenizers of LLaMA-2's kind put a space before every text that is encoded.
@pytest.mark.parametrize("source", ["llama2", "byte_fallback"])
def test_llama2(sentencepieces, source):
    template = Llama2(BYTE_FALLBACK if source == "byte_fallback" else sentencepieces["llama2"])
    expected = "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Who? [/INST]"
    assert shown(template, template.encode(ONE_ROUND)) == expected
    expected += " I am. </s><s> [INST] Why [/INST]"
    assert shown(template, template.encode(TWO_ROUNDS)) == expected
    assert shown(template, supervised(template, TWO_ROUNDS)) == " I am. </s>"
    assert template.stop_ids == (2,)
    assert (template.sampling.temperature, template.sampling.top_p, template.sampling.top_k) == (0.6, 0.9, 0)


@settings(max_examples=100, deadline=None)
@given(user=st.text(), reply=st.text())
@example(user="", reply="")
@example(user="x ", reply="  .]\n")
@pytest.mark.parametrize("source", ["llama2", "byte_fallback"])
def test_llama2_encodes_a_round_as_one_text(sentencepieces, source, user, reply):
    tokenizer = BYTE_FALLBACK if source == "byte_fallback" else sentencepieces["llama2"]
    whole = tokenizer.encode(f"[INST] {user.strip()} [/INST] {reply.strip()} ")
    messages = [Message("user", user), Message("assistant", reply)]
    assert Llama2(tokenizer).encode(messages, False) == [1, *whole, 2]


def test_baichuan2(sentencepieces):
    template = Baichuan2(sentencepieces["baichuan2"], 300, 301)
    assert shown(template, template.encode(ONE_ROUND)) == "Be brief.<reserved_106> Who? <reserved_107>"
    assert shown(template, template.encode(TWO_ROUNDS)) == (
        "Be brief.<reserved_106> Who? <reserved_107>\tI am. <reserved_106>\n\nWhy<reserved_107>"
    )
    assert shown(template, supervised(template, TWO_ROUNDS)) == "\tI am. <reserved_106>"
    assert template.stop_ids == (2, 300, 301)
    assert dataclasses.astuple(template.sampling)[1:5] == (0.3, 5, 0.85, 1.05)
    fields = {field.name: field.default for field in dataclasses.fields(Baichuan2)}
    assert (fields["user_id"], fields["assistant_id"]) == (195, 196)


def test_where_baichuan2_replies_end(sentencepieces):
    template = Baichuan2(sentencepieces["baichuan2"], 300, 301)
    segments = template.segments([*TWO_ROUNDS, Message("assistant", "Why not")], False)
    assert segments[-1] == ([2], "assistant", True, ())
    assert [segment for segment in segments if segment.labels] == [([300], "user", True, (2,))]
    assert 2 not in template.encode(TWO_ROUNDS, False)
    with pytest.raises(UserError, match="needs a tokenizer with an eos token"):
        Baichuan2(JsonTokenizer(GOLDEN["tokenizers"]["byte_level"]["definition"]))


def test_baichuan2_keeps_typed_markers_as_text(sentencepieces):
    tokenizer = sentencepieces["baichuan2"]
    ids = Baichuan2(tokenizer, 300, 301).encode([Message("user", "a<reserved_106>b<reserved_107><reserved_106>")])
    assert (ids[0], ids[-1], ids.count(300), ids.count(301)) == (300, 301, 1, 1)
    assert tokenizer.decode(ids[1:-1]) == "a<reserved_106>b<reserved_107><reserved_106>"


def test_chatml():
    template = ChatML(BYTE_LEVEL)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Who? <|im_end|>\n"
    assert shown(template, template.encode(ONE_ROUND)) == expected + "<|im_start|>assistant\n"
    assert shown(template, template.encode(ONE_ROUND, False)) == expected
    expected += "<|im_start|>assistant\n\tI am. <|im_end|>\n<|im_start|>user\n\n\nWhy<|im_end|>\n"
    assert shown(template, template.encode(TWO_ROUNDS)) == expected + "<|im_start|>assistant\n"
    assert shown(template, supervised(template, TWO_ROUNDS)) == "\tI am. <|im_end|>"
    assert shown(template, template.encode([USER])).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
    )
    assert [shown(template, [i]) for i in template.stop_ids] == ["<|im_end|>", "<|im_start|>"]
    assert (template.sampling.temperature, template.sampling.top_p) == (1.0, 0.8)


def test_what_qwens_published_code_trains_on():
    template = ChatML(BYTE_LEVEL, marks_supervised=True)
    messages = [*TWO_ROUNDS, Message("assistant", "Why not")]
    assert template.encode(messages, False) == ChatML(BYTE_LEVEL).encode(messages, False)
    assert shown(template, supervised(template, messages)) == (
        "<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>\tI am. <|im_end|>\n"
        "<|im_start|><|im_end|>\n<|im_start|>Why not<|im_end|>\n"
    )


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['tokenizer']}-{case['template']}")
def test_jinja_templates_as_transformers_encodes_them(case):
    template = JinjaTemplate(golden_tokenizer(case["tokenizer"]), GOLDEN["templates"][case["template"]])
    messages = [Message(*message) for message in case["messages"]]
    assert template.encode(messages, messages[-1].role == "user") == case["ids"]


def test_where_replies_of_a_jinja_template_end():
    ends = {name: JinjaTemplate(BYTE_LEVEL, source).stop_ids for name, source in GOLDEN["templates"].items()}
    assert ends == {"chatml": (2,), "llama2": (2,), "modern": (2,)}
    source = "{% for m in messages %}{{ m.content }}\n<|im_start|>{% endfor %}"
    assert JinjaTemplate(BYTE_LEVEL, source).stop_ids == (2, 1)  # the end of text, and what follows a reply


def test_replies_of_a_jinja_template():
    why = Message("user", "Why")
    rounds = [USER, Message("assistant", "I am. "), why, Message("assistant", "Why not")]
    chatml = JinjaTemplate(BYTE_LEVEL, GOLDEN["templates"]["chatml"])
    assert shown(chatml, supervised(chatml, rounds)) == "I am. <|im_end|>Why not<|im_end|>"
    assert [segment.role for segment in chatml.segments(rounds, False)] == ["", "assistant", "", "assistant", ""]
    llama = JinjaTemplate(BYTE_FALLBACK, GOLDEN["templates"]["llama2"])
    assert shown(llama, supervised(llama, rounds)) == " I am. </s> Why not </s>"
    for template, own in ((chatml, ChatML(BYTE_LEVEL)), (llama, Llama2(BYTE_FALLBACK))):
        with_system = [SYSTEM, *rounds]
        assert supervised(template, with_system) == supervised(own, with_system)
        whole = [token for segment in template.segments(with_system, False) for token in segment.ids]
        assert whole == template.encode(with_system, False) == own.encode(with_system, False)


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ WORDS }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TURN.replace("WORDS", "m.content if loop.last else m.content.split('</a>') | last"), "in another way once"),
        ("{% for m in messages if m.content != 'a</a>b' %}{{ m.content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}A:{% endif %}", "in another way once"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ends a reply with no token"),
        (TURN.replace("WORDS", "m.content ~ messages[0].content"), "depends on what others say"),
    ],
)  # fmt: skip
def test_jinja_templates_whose_replies_cannot_be_told_apart(source, message):
    template = JinjaTemplate(BYTE_LEVEL, source)
    rounds = [Message("user", "hi"), Message("assistant", "a</a>b"), Message("user", "so"), Message("assistant", "c")]
    template.encode(rounds, False)  # they are good to talk in
    with pytest.raises(UserError, match=f"{message}.*name another template"):
        template.segments(rounds, False)


NAMES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<reserved_106>", "<reserved_107>"]
fragments = st.sampled_from([*NAMES, *(name[:i] for name in NAMES for i in (1, 5, -1)), "im_end|>", ">", "\ufdd0", " "])
typed = st.lists(fragments | st.text(max_size=4), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(contents=st.tuples(typed, typed, typed, typed))
@example(contents=("<|im_end|>", "<|im_", "end|>", "</s><s>"))
def test_nothing_that_people_type_is_a_control_token(sentencepieces, contents):
    roles = ("system", "user", "assistant", "user")
    for template in (
        Llama2(sentencepieces["llama2"]),
        Llama2(BYTE_FALLBACK),
        Baichuan2(sentencepieces["baichuan2"], 300, 301),
        ChatML(BYTE_LEVEL),
        JinjaTemplate(BYTE_LEVEL, GOLDEN["templates"]["chatml"]),
        JinjaTemplate(BYTE_FALLBACK, GOLDEN["templates"]["llama2"]),
        JinjaTemplate(BYTE_LEVEL, "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"),
    ):
        control = {*template.tokenizer.special_ids.values(), *template.stop_ids}
        typed_ids = template.encode([Message(*pair) for pair in zip(roles, contents)])
        harmless = template.encode([Message(role, "x") for role in roles])
        assert [i for i in typed_ids if i in control] == [i for i in harmless if i in control], template
        text = shown(template, typed_ids)
        if template.name != "llama2" and template.tokenizer is BYTE_LEVEL:
            assert all(content in text for content in contents)


def test_the_templates_own_text_is_encoded_together_with_what_is_typed():
    template = JinjaTemplate(BYTE_LEVEL, "capital of {{ messages[0].content | trim }}")
    assert template.encode([Message("user", " France ")]) == BYTE_LEVEL.encode("capital of France")
    assert template.encode([Message("user", "<|im_end|> ")]) == BYTE_LEVEL.encode("capital of <|im_end|>")


def test_a_template_that_looks_into_messages_for_control_tokens():
    source = "{{ messages[0].content.split('<|im_end|>')[0] }}<|im_end|>"
    template = JinjaTemplate(BYTE_LEVEL, source)
    assert template.encode([Message("user", "hi")]) == [*BYTE_LEVEL.encode("hi"), 2]
    with pytest.raises(UserError, match="holds the name of a control token"):
        template.encode([Message("user", "a<|im_end|>b")])


EACH = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{{ %s }}<|im_end|>\n{%% endfor %%}"


@pytest.mark.parametrize(
    ("changed", "content"),
    [
        ("m.content | lower", "a<|IM_END|>b"),
        ("m.content | replace('[img]', '')", "a<|im_[img]end|>b"),
        ("m.content.split('</think>') | join('')", "<|im_</think>end|>"),
        ("m.content[::-1]", ">|dne_mi|<"),
        ("m.content | replace('STOP', '<|im_end|>')", "STOP"),
    ],
)
def test_a_template_that_makes_control_tokens_of_what_is_typed(changed, content):
    template = JinjaTemplate(BYTE_LEVEL, EACH % changed)
    assert template.encode([USER, Message("assistant", "A [img] </think> < b")]).count(2) == 2
    with pytest.raises(UserError, match=r"makes the control token <\|im_end\|> out of what a message says"):
        template.encode([USER, Message("assistant", content)])


def test_a_message_that_is_left_out_makes_no_room_for_a_control_token():
    source = EACH.replace(" %%}<", " if m.content != 'skip me' %%}<") % "m.content | lower"
    template = JinjaTemplate(BYTE_LEVEL, source)
    skipped = [Message("user", "skip me"), Message("assistant", "a")]
    assert template.encode(skipped).count(2) == 1
    with pytest.raises(UserError, match=r"makes the control token <\|im_end\|>"):
        template.encode([*skipped, Message("user", "<|IM_END|>")])


@pytest.mark.parametrize("content", ["hello", "", " \n", "<|im_end|>", "<think>a</think>b", "a" * 99])
def test_templates_may_depend_on_messages_in_other_ways(content):
    for changed in (
        "m.content[:40] if m.content else '<|endoftext|>'",
        "m.content | trim if m.content.strip() else '<|endoftext|>'",
        "m.content | tojson",
    ):
        assert JinjaTemplate(BYTE_LEVEL, EACH % changed).encode([Message("user", content)]).count(2) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in %}", r"Expected an expression.*\(line 1\)"),
        ("\n{% endfor %}", r"Encountered unknown tag 'endfor'.*\(line 2\)"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ raise_exception('only\ntwo roles') }}", "only two roles"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages.append(1) }}", "does what no template may"),
        ("{{ ''.__class__.__mro__ }}", "does what no template may"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "does what no template may"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "does what no template may"),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "needs more memory"),
        ("{{ 'a' * 20000000 }}", "it writes more than 16,777,216 characters"),
        ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "more memory"),
        ("{{ 7 ** 10000000000 }}", "it needs more than 3 s"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it needs more than 3 s"),
    ],
)
def test_broken_and_hostile_templates_end_in_one_line(source, message):
    with pytest.raises(UserError, match=message) as failure:
        JinjaTemplate(BYTE_LEVEL, source).encode([USER])
    assert "\n" not in str(failure.value)
    assert template_sandbox.render("{{ 6 * 7 }}", {}) == "42"  # by the same process or by another


def test_the_time_in_a_template():
    assert template_sandbox.render("{{ strftime_now('%Y-%m') }}", {}, now=86400.0 * 365) == "1971-01"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("", "the conversation has no message of the user's"),
        ("s", "the conversation has no message of the user's"),
        ("a", "message 1 is the assistant's, where the user's must come"),
        ("suu", "message 3 is the user's, where the assistant's must come"),
        ("us", "message 2 is the system's, where the assistant's must come"),
        ("ua", "the last message is the assistant's: there is nothing to reply to"),
    ],
)
def test_messages_out_of_order(sentencepieces, roles, message):
    messages = [Message({"s": "system", "u": "user", "a": "assistant"}[role], "x") for role in roles]
    for template in (ChatML(BYTE_LEVEL), Llama2(BYTE_FALLBACK), Baichuan2(sentencepieces["baichuan2"], 300, 301)):
        with pytest.raises(UserError, match=message):
            template.encode(messages)


def test_mistakes(sentencepieces):
    with pytest.raises(UserError, match="role is 'bot'; it must be one of system, user, assistant"):
        Message("bot", "x")
    with pytest.raises(UserError, match="content must be text, got 3"):
        Message("user", 3)
    for role in ("system", "user"):
        messages = [SYSTEM, USER] if role == "user" else [SYSTEM]
        messages[-1] = Message(role, "x [/INST] y")
        with pytest.raises(UserError, match=rf"message {len(messages)} holds \[/INST\], which"):
            Llama2(BYTE_FALLBACK).encode([*messages, USER][:2])
    Llama2(BYTE_FALLBACK).encode([USER, Message("assistant", "[INST]")], False)  # only a model's own words
    with pytest.raises(UserError, match=r"needs a tokenizer with <\|im_start\|>"):
        ChatML(BYTE_FALLBACK)
    with pytest.raises(UserError, match=r"id 195 as a marker, which is not reserved .*: name another chat template"):
        Baichuan2(sentencepieces["llama2"])
    with pytest.raises(UserError, match="id 999 as a marker"):
        Baichuan2(sentencepieces["baichuan2"], 300, 999)
    with pytest.raises(UserError, match="needs a tokenizer with bos and eos"):
        Llama2(JsonTokenizer(GOLDEN["tokenizers"]["byte_level"]["definition"]))


def test_the_oldest_rounds_go_first_and_the_system_message_stays():
    template = ChatML(BYTE_LEVEL)
    messages = [SYSTEM, *([USER, REPLY] * 3), AGAIN]
    whole = len(template.encode(messages))
    one_round = whole - len(template.encode([SYSTEM, *([USER, REPLY] * 2), AGAIN]))
    assert chat.fit(template, messages, whole) == messages
    assert chat.fit(template, messages, whole - 1) == [SYSTEM, *([USER, REPLY] * 2), AGAIN]
    assert chat.fit(template, messages, whole - 2 * one_round - 1) == [SYSTEM, AGAIN]
    needed = len(template.encode([SYSTEM, AGAIN]))
    assert chat.fit(template, messages, needed) == [SYSTEM, AGAIN]
    with pytest.raises(UserError, match=f"needs {needed} tokens, and there is room for {needed - 1}"):
        chat.fit(template, messages, needed - 1)


def test_choosing():
    assert chat.choose("auto", BYTE_LEVEL, "{{ 1 }}") == JinjaTemplate(BYTE_LEVEL, "{{ 1 }}")
    assert chat.choose("auto", BYTE_LEVEL) == ChatML(BYTE_LEVEL)
    assert chat.choose("llama2", BYTE_FALLBACK, "{{ 1 }}") == Llama2(BYTE_FALLBACK)
    with pytest.raises(UserError, match="does not say how it is talked to: name a chat template, llama2 or baichuan2"):
        chat.choose("auto", BYTE_FALLBACK)
    with pytest.raises(UserError, match="files hold no chat template"):
        chat.choose("file", BYTE_LEVEL)
    with pytest.raises(UserError, match="unknown chat template 'vicuna'"):
        chat.choose("vicuna", BYTE_LEVEL)
