"""Templated instructions: one right answer each, checked by rule; and small talk out of a package made here."""

import itertools
import re
import zipfile

import pytest

from llm_jax.alignment import conversations, instructions, skills
from llm_jax.alignment.conversations import Conversation, Tally
from llm_jax.alignment.instructions import Exercise
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

LAWS = [(f"{name}法", "", f"第{i}条", f"{name}的第{i}个规定。") for name in "甲乙丙丁" for i in range(30)]
LAWS += [("己法", "", f"第{i}条", f"己法的第{i}个规定。") for i in range(30)]


def request(exercise):
    return exercise.conversation.messages[0].content


def test_articles_are_asked_for_by_law_number_and_text():
    tally = Tally()
    twice = [
        ("甲法", "", "第1条", "又一个。"),
        ("戊法", "", "第9条", "乙的第2个规定。"),
        ("戊法", "", "第8条", "长" * 201),
    ]
    found = list(instructions.statute_exercises(LAWS + twice, tally))
    assert tally.counts == {"article that is there twice": 4, "article that is too long": 1}
    by_subject = {f"《{law}》{number}": (law, number, text) for law, _, number, text in LAWS}
    kinds = set()
    for exercise in found:
        law, number, text = by_subject[exercise.conversation.record]
        answer = {"law_of_article": f"《{law}》", "number_of_article": number, "text_of_article": text}[exercise.kind]
        assert exercise.answer == answer
        assert (text in request(exercise)) == (exercise.kind != "text_of_article")
        assert answer not in request(exercise) or exercise.kind == "number_of_article"
        assert law not in request(exercise) or exercise.kind != "law_of_article"
        kinds.add((exercise.kind, request(exercise)[:3]))
    assert len(kinds) > 4  # every kind, asked in several ways


def test_idioms_have_one_answer_each():
    rows = [("守株待兔", "shǒu"), ("守株待鹿", "shǒu"), ("画蛇添足", "huà"), ("亡羊补牢", "wáng"), ("亡羊补牢", "x")]
    entries = [{"word": word, "pinyin": reading, "explanation": f"比喻{word[:2]}"} for word, reading in rows]
    tally = Tally()
    found = {e.conversation.record: e for e in instructions.idiom_exercises(entries, tally)}
    assert set(found) == {word for word, _ in rows} and not tally.counts
    # Of these three, one has no gap, reading or explanation of its own.
    three = [{"word": word, "pinyin": "y", "explanation": "z"} for word in ("甲乙", "甲丙", "丁乙")]
    assert [e.conversation.record for e in instructions.idiom_exercises(three, tally)] == ["甲丙", "丁乙"]
    assert tally.counts == {"idiom without a single answer": 1}
    # The two that differ in the last character share an explanation, a reading and that gap.
    for word in ("守株待兔", "守株待鹿"):
        assert found[word].kind == "missing_character" and "守株待＿" not in request(found[word])
    for exercise in found.values():
        gapped = request(exercise).translate({ord(mark): " " for mark in "“”："}).split()
        if exercise.kind == "missing_character":
            (gap,) = [part for part in gapped if "＿" in part]
            filled = gap.split("中")[0].replace("＿", exercise.answer)
            assert exercise.conversation.record in filled
        else:
            assert exercise.answer == exercise.conversation.record


def value_of(numeral):
    """A Chinese number's value, read from the left: a unit multiplies the digit before it, or one where none is."""
    total = digit = 0
    for sign in numeral:
        if sign in "十百千":
            total, digit = total + (digit or 1) * 10 ** ("十百千".index(sign) + 1), 0
        else:
            digit = "零一二三四五六七八九".index(sign)
    return total + digit


def test_chinese_numbers():
    assert all(value_of(skills.chinese_number(number)) == number for number in range(1, 10_000))
    known = {10: "十", 15: "十五", 20: "二十", 101: "一百零一", 110: "一百一十", 1001: "一千零一", 1015: "一千零一十五"}
    assert {number: skills.chinese_number(number) for number in known} == known
    assert not any(map(re.compile("零零|零$|^零").search, map(skills.chinese_number, range(1, 10_000))))


def test_skills_have_right_answers_and_subjects_of_their_own():
    found, tally = instructions.exercises(("skills",))
    assert len({exercise.conversation.record for exercise in found}) == len(found) == 5 * skills.COUNT
    assert not tally.counts and len({request(exercise) for exercise in found}) == len(found)
    for exercise in found:
        answer, asked = exercise.answer, request(exercise)
        words = re.findall("[a-z]+", re.split("[:：？?]", asked, maxsplit=1)[-1])
        if exercise.kind == "sum":
            assert sum(map(int, re.findall(r"\d+", asked))) == int(answer)
        elif exercise.kind == "chinese_number":
            assert value_of(answer) == int(re.search(r"\d+", asked)[0])
        elif exercise.kind == "last_word":
            assert answer == words[-1] and 3 <= len(words) <= 5
        elif exercise.kind == "capitals":
            assert answer.lower().split() == words and answer == answer.upper()
        else:
            ordered = answer.split()
            assert all(a < b for a, b in itertools.pairwise(ordered)) and set(ordered) == set(words)
        assert instructions.solves(answer, exercise) and not instructions.solves(f"{answer}x", exercise)
    sums = [sorted(map(int, re.findall(r"\d+", request(e)))) for e in found if e.kind == "sum"]
    assert len(set(map(tuple, sums))) == skills.COUNT  # 3 + 4 and 4 + 3 are not on both sides of a split


def test_a_call_of_a_tool_is_solved_by_the_same_call():
    call = 'Thought: Hm.\nAction: clock\nAction Input: {"zone": "Oslo", "day": 1}'
    messages = (Message("system", "clock"), Message("user", "?"), Message("assistant", call))
    exercise = Exercise(instructions.TOOL, Conversation(messages))
    assert instructions.solves('Thought: So.\nAction: clock\nAction Input: {"day": 1, "zone": "Oslo"}', exercise)
    for wrong in (call.replace("clock", "weather"), call.replace("Oslo", "Rome"), call.replace(', "day": 1', ""), "12"):
        assert not instructions.solves(wrong, exercise)


@pytest.mark.parametrize("kind", ["function", instructions.TOOL])
def test_an_answer_that_is_none_is_not_every_wrong_reply(kind):
    exercise = Exercise(kind, Conversation((Message("user", "?"), Message("assistant", "def broken("))))
    assert not instructions.solves("I do not know", exercise)


def test_exercises_are_written_and_read(tmp_path):
    path = tmp_path / "exercises.jsonl"
    made = instructions.exercises(("skills",), limit=20)[0]
    instructions.write_exercises(path, made)
    read = instructions.read_exercises(path)
    assert [(e.kind, e.conversation.messages) for e in read] == [(e.kind, e.conversation.messages) for e in made]
    assert [talk.messages for talk in conversations.read(path)[0]] == [e.conversation.messages for e in made]
    good = path.read_text()
    for bad, message in (
        ('{"messages": []}\n', "exercises.jsonl:21"),
        ('{"kind": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
         "unknown kind of exercise .first exercises.jsonl:21: 'x'"),
        (good.splitlines()[0].replace("]}", ', {"role": "user", "content": "a"}]}') + "\n", "without an answer"),
    ):  # fmt: skip
        path.write_text(good + bad)
        with pytest.raises(UserError, match=message):
            instructions.read_exercises(path)


MODULE = '''
class Thing:
    @property
    def size(self, unit="cm"):
        """How large it is."""
        return 3 if unit == "cm" else 30

def undocumented(a):
    return a

def stub():
    """Nothing but words."""

def add(a, b=1, *rest, key: int = 0) -> int:
    """Add two numbers.

    And more.
    """
    # a comment
    return a + b

def add(a, b=1, *rest, key: int = 0) -> int:
    """Add two numbers.

    And more.
    """
    return a + b
'''


def test_functions_are_asked_for_by_their_documentation():
    tally = Tally()
    size, add = sorted(instructions.function_exercises([MODULE], tally), key=request, reverse=True)
    if "size" not in request(size):
        size, add = add, size
    assert "def add(a, b=1, *rest, key: int=0)" in request(add) and "Add two numbers.\n\nAnd more." in request(add)
    assert add.answer == "def add(a, b=1, *rest, key: int=0) -> int:\n    return a + b"
    assert size.answer.startswith("def size(self, unit='cm'):") and "How large" not in size.answer
    assert tally.counts == {"repeated function": 1}
    assert instructions.solves(add.answer, add)
    fenced = "Sure:\n```python\ndef add(a, b=1, *rest, key: int = 0):\n    return 7\n```\nThat is it."
    assert instructions.solves(fenced, add)
    for wrong in (
        "def add(a, b=1, *rest):\n    pass",
        "def sub(a, b=1, *rest, key: int=0): pass",
        "def add(",
        "words",
        "",
    ):
        assert not instructions.solves(wrong, add)


def test_replies_are_compared_but_for_marks_and_spaces():
    (exercise,) = instructions.idiom_exercises([{"word": "画蛇添足", "pinyin": "h", "explanation": "多余"}], Tally())
    right = exercise.answer
    for reply in (right, f" {right}\n", f"“{right}”。", f"《{right}》"):
        assert instructions.solves(reply, exercise)
    for reply in ("", f"{right}！", f"是{right}", right[:-1] + "水"):
        assert not instructions.solves(reply, exercise)


def test_a_split_holds_subjects_out():
    found = list(instructions.statute_exercises(LAWS, Tally()))
    train, heldout = instructions.split(found, 0.3)
    assert len(train) + len(heldout) == len(found) and 20 < len(heldout) < 55
    assert instructions.split(found[::-1], 0.3)[1] == heldout[::-1]


def test_some_of_a_source(monkeypatch):
    monkeypatch.setattr(instructions, "fetch", lambda package, cache: None)
    monkeypatch.setattr(instructions.readers, "articles", lambda path: LAWS)
    monkeypatch.setattr(instructions.readers, "standard_library", lambda: iter([MODULE]))
    some, _ = instructions.exercises(("statutes", "functions"), limit=10)
    assert len(some) == 12
    more, _ = instructions.exercises(("statutes",), limit=20)
    assert more[:10] == some[:10]
    assert len(instructions.exercises(("statutes",))[0]) == len(LAWS)
    assert 0.1 < len(instructions.split(more, 0.5)[1]) / 20 < 0.9  # what is drawn is not what is held out
    with pytest.raises(UserError, match="did you mean 'statutes'"):
        instructions.exercises(("statute",))


TALK = """
categories:
- x
conversations:
- - Is it so?
  - Yes
- - How many?
  - 22
  - Really?
- - Is it so?
  - Yes
- "no list"
- - Alone
- - Hm
  - ''
"""


def test_small_talk_is_text_in_turns(tmp_path):
    path = tmp_path / "talk.whl"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("chatterbot_corpus/data/english/x.yml", TALK)
        package.writestr("chatterbot_corpus/data/german/y.yml", TALK)
    found, tally = instructions.read_small_talk(path, "english")
    assert [[message.content for message in talk.messages] for talk in found] == [
        ["Is it so?", "Yes"],
        ["How many?", "22"],
    ]
    assert [talk.messages[1].role for talk in found] == ["assistant"] * 2
    assert found[1].record == "english/x.yml, conversation 2"
    assert tally.counts == {
        "repeated conversation": 1,
        "last turn without a reply": 1,
        "conversation that is no list of texts": 1,
        "no reply": 1,
        "empty reply": 1,
    }
    instructions.write(tmp_path / "talk.jsonl", found)
    read, _ = conversations.read(tmp_path / "talk.jsonl")
    assert [talk.messages for talk in read] == [talk.messages for talk in found]


@pytest.mark.slow
def test_the_real_sets():
    found, _ = instructions.exercises()
    assert all(instructions.solves(exercise.answer, exercise) for exercise in found)
    counts = {kind: sum(exercise.kind == kind for exercise in found) for kind in instructions.REQUESTS}
    assert min(counts.values()) > 3_000
    for language, least in (("en", 1_000), ("zh", 480)):
        talk, _ = instructions.small_talk(language)
        assert sum(len(conversation.messages) // 2 for conversation in talk) > least
