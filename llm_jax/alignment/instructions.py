"""Instructions with replies: templated ones whose answers can be checked, and small talk.

The templated ones are made by rule: skills such as sums from nothing at all (see `skills`), others from Chinese
statutes, Chinese idioms and the functions of Python's own library. Nobody asked them, and they are no substitute for
what people ask. Small talk is chatterbot-corpus's.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm_jax.alignment import conversations, skills, tool_use
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally, in_order
from llm_jax.alignment.preferences import is_held_out
from llm_jax.alignment.ratings import fetch
from llm_jax.config import one_of
from llm_jax.data import readers
from llm_jax.data.documents import text_hash
from llm_jax.data.packages import Package, members
from llm_jax.data.sources import IDIOM, LAW
from llm_jax.errors import require
from llm_jax.files import write_lines
from llm_jax.tokenization.chat import Message

CHATTERBOT = Package(
    "chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 345_706
)
SOURCES = ("skills", "statutes", "idioms", "functions")
TOOL = "tool"  # the kind of an exercise whose answer is a call of a tool
LONGEST_ANSWER = 200  # characters of an article that is to be recited
LONGEST_FUNCTION = 1200  # characters of source
CHAT_LANGUAGES = {"en": "english", "zh": "chinese"}
# Of each kind of exercise, how it is asked. Which way one is asked follows from its subject.
REQUESTS = {
    "law_of_article": ("下面的条文出自哪部法律？\n{text}", "{text}\n\n以上规定出自哪部法律？请只写法律名称。"),
    "number_of_article": (
        "《{law}》\n{number}　{text}\n\n这是第几条？",
        "请指出下面引用的是第几条。\n《{law}》{number}：{text}",
    ),
    "text_of_article": ("请写出《{law}》{number}的内容。", "《{law}》{number}是怎么规定的？"),
    "idiom_of_explanation": ("哪个成语的意思是：{explanation}", "请根据解释写出成语。\n解释：{explanation}"),
    "missing_character": ("成语“{gapped}”中缺了哪个字？", "请填空，只写缺少的字：{gapped}"),
    "idiom_of_pinyin": ("拼音“{pinyin}”是哪个成语？", "请写出读作“{pinyin}”的成语。"),
    "function": (
        "Write a Python function with the signature `{signature}`.\n\n{description}",
        "Implement this in Python.\n\n{signature}\n\n{description}",
    ),
    **skills.REQUESTS,
}


class Exercise(NamedTuple):
    """A request with a right reply."""

    kind: str  # a key of REQUESTS, or TOOL
    conversation: Conversation  # the request and the right reply

    @property
    def answer(self) -> str:
        """The right reply."""
        return self.conversation.messages[-1].content


def exercises(sources: Iterable[str] = SOURCES, limit: int = 0, cache: str = "") -> tuple[list[Exercise], Tally]:
    """Templated instructions with answers that can be checked, and what was left out.

    Each skill's subject, statute article, idiom and function makes one exercise at most, so that holding exercises out
    holds out what they are about.

    Args:
        sources: some of SOURCES.
        limit: of exercises from each source, drawn by hash; 0 = all.
        cache: the folder of downloads; "" = the user's.

    Raises:
        UserError: a download fails, or there is no such source.
    """
    found, tally = [], Tally()
    for source in sources:
        one_of("source", source, SOURCES)
        # Another hash than that of the split, or the first ones would all be held out.
        made = sorted(_make(source, cache, tally), key=lambda exercise: text_hash(exercise.conversation.record, seed=1))
        found += made[: limit or None]
    return found, tally


def solves(reply: str, exercise: Exercise) -> bool:
    """Whether a reply is right.

    A function must parse and have the name and the parameters that were asked for: what it does is not run. A call of
    a tool must be of that tool, with those arguments. Anything else must be the answer, but for white space and for
    quotation marks and full stops around it.
    """
    if exercise.kind in ("function", TOOL):
        read = _parameters if exercise.kind == "function" else tool_use.call
        wanted = read(exercise.answer)
        return wanted is not None and read(reply) == wanted  # an answer that is none is nobody's
    return _bare(reply) == _bare(exercise.answer)


def split(made: Iterable[Exercise], fraction: float) -> tuple[list[Exercise], list[Exercise]]:
    """(to train on, held out), by the hash of what each exercise is about."""
    sides: tuple[list[Exercise], list[Exercise]] = ([], [])
    for exercise in made:
        sides[is_held_out(exercise.conversation.record, fraction)].append(exercise)
    return sides


def small_talk(language: str, cache: str = "") -> tuple[list[Conversation], Tally]:
    """The conversations of chatterbot-corpus in "en" or "zh", without a last turn that has no reply.

    Raises `UserError` where the download fails.
    """
    one_of("language", language, tuple(CHAT_LANGUAGES))
    return read_small_talk(fetch(CHATTERBOT, cache), CHAT_LANGUAGES[language])


def read_small_talk(path: Path, language: str) -> tuple[list[Conversation], Tally]:
    """The conversations in the package's file; its turns are the user's and the assistant's by turns."""
    found: dict[tuple[Message, ...], Conversation] = {}
    tally = Tally()
    for name, content in members(path, f"chatterbot_corpus/data/{language}/*.yml"):
        file = "/".join(Path(name).parts[-2:])
        # The base loader leaves all as text: "22" and "Yes" are replies, not a number and a truth.
        for number, turns in enumerate(yaml.load(content, Loader=yaml.BaseLoader)["conversations"], start=1):
            record = f"{file}, conversation {number}"
            try:
                messages = _turns(turns)
            except BadRecordError as error:
                tally.add(error.reason, record, error.detail)
                continue
            if len(turns) % 2:
                tally.add("last turn without a reply", record)
            if messages in found:
                tally.add("repeated conversation", record)
            else:
                found[messages] = Conversation(messages, f"small_talk_{language}", record)
    return list(found.values()), tally


def write(path: str | Path, found: Iterable[Conversation]) -> None:
    """Write conversations as JSON Lines that `conversations.read` takes, atomically."""
    write_lines(Path(path), map(_record, found))


def write_exercises(path: str | Path, made: Iterable[Exercise]) -> None:
    """Write exercises as JSON Lines: conversations, each with the kind of the exercise."""
    write_lines(Path(path), ({"kind": exercise.kind, **_record(exercise.conversation)} for exercise in made))


def read_exercises(path: str | Path) -> list[Exercise]:
    """The exercises of a file that `write_exercises` wrote; `UserError` naming the first record that is none."""

    def exercise(value: Any, source: str, record: str) -> Exercise:
        messages = conversations.parse(value, "messages")
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in (*REQUESTS, TOOL):
            raise BadRecordError("unknown kind of exercise", repr(kind)[:30])
        if messages[-1].role != "assistant":
            raise BadRecordError("exercise without an answer")
        return Exercise(kind, Conversation(messages, source, record))

    found, tally = conversations.read_each(path, exercise, "exercise")
    require(not tally.counts, f"{path} holds what is no exercise: {tally}")
    return found


def _record(conversation: Conversation) -> dict[str, Any]:
    return {"messages": [{"role": message.role, "content": message.content} for message in conversation.messages]}


def _turns(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise BadRecordError("conversation that is no list of texts", repr(turns)[:30])
    paired = turns[: len(turns) // 2 * 2]
    return in_order([Message(role, turn.strip()) for role, turn in zip(("user", "assistant") * len(turns), paired)])


def _make(source: str, cache: str, tally: Tally) -> Iterator[Exercise]:
    if source == "skills":
        return (_exercise(kind, source, subject, answer, **fields) for kind, subject, answer, fields in skills.draw())
    if source == "statutes":
        return statute_exercises(readers.articles(fetch(LAW, cache)), tally)
    if source == "idioms":
        return idiom_exercises(list(readers.idiom_entries(fetch(IDIOM, cache))), tally)
    return function_exercises(readers.standard_library(), tally)


def statute_exercises(articles: list[tuple[str, str, str, str]], tally: Tally) -> Iterator[Exercise]:
    """One exercise an article (law, chapter, number, text), but for numbers a law has twice, and texts found twice."""
    numbers = Counter((law, number) for law, _, number, _ in articles)
    texts = Counter(text for *_, text in articles)
    for law, _, number, text in articles:
        subject = f"《{law}》{number}"
        if numbers[law, number] > 1 or texts[text] > 1:
            tally.add("article that is there twice", subject)
        elif len(text) > LONGEST_ANSWER:
            tally.add("article that is too long", subject)
        else:
            kinds = {"number_of_article": number, "text_of_article": text}
            if law not in text:
                kinds["law_of_article"] = f"《{law}》"
            kind = _draw(sorted(kinds), subject)
            yield _exercise(kind, "statutes", subject, kinds[kind], law=law, number=number, text=text)


def idiom_exercises(entries: list[dict[str, str]], tally: Tally) -> Iterator[Exercise]:
    """One exercise an idiom, of a kind to which no other idiom is an answer too."""
    entries = list({entry["word"]: entry for entry in entries}.values())
    words = Counter(gapped for entry in entries for gapped, _ in _gaps(entry["word"]))
    explanations = Counter(entry["explanation"] for entry in entries)
    readings = Counter(entry["pinyin"] for entry in entries)
    for entry in entries:
        word = entry["word"]
        gaps = [(gapped, missing) for gapped, missing in _gaps(word) if words[gapped] == 1]
        kinds = ["missing_character"] * bool(gaps)
        kinds += ["idiom_of_pinyin"] * (readings[entry["pinyin"]] == 1)
        explanation = entry["explanation"]
        kinds += ["idiom_of_explanation"] * (explanations[explanation] == 1 and word not in explanation)
        if not kinds:
            tally.add("idiom without a single answer", word)
            continue
        kind = _draw(kinds, word)
        gapped, missing = gaps[text_hash(word) % len(gaps)] if gaps else ("", "")
        answer = missing if kind == "missing_character" else word
        yield _exercise(kind, "idioms", word, answer, gapped=gapped, pinyin=entry["pinyin"], explanation=explanation)


def function_exercises(modules: Iterable[str], tally: Tally) -> Iterator[Exercise]:
    """One exercise a documented function or method of Python modules; its docstring is the request."""
    seen: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(module)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
                continue
            source = ast.unparse(_without_docstring(node))
            description = ast.get_docstring(node) or ""
            if len(source) + len(description) > LONGEST_FUNCTION:
                tally.add("function that is too long", node.name)
            elif f"{source}{description}" in seen:
                tally.add("repeated function", node.name)
            else:
                seen.add(f"{source}{description}")
                signature = f"def {node.name}({ast.unparse(node.args)})"
                yield _exercise(
                    "function", "functions", f"{node.name} {text_hash(source + description):016x}", source,
                    signature=signature, description=description,
                )  # fmt: skip


def _exercise(kind: str, source: str, subject: str, answer: str, **fields: str) -> Exercise:
    request = _draw(REQUESTS[kind], subject + kind).format(**fields)
    messages = (Message("user", request), Message("assistant", answer))
    return Exercise(kind, Conversation(messages, source, subject))


def _draw(choices: Sequence[str], subject: str) -> str:
    return choices[text_hash(subject) % len(choices)]


def _gaps(word: str) -> Iterator[tuple[str, str]]:
    """The word without each of its characters, and that character."""
    for i, character in enumerate(word):
        yield f"{word[:i]}＿{word[i + 1 :]}", character


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    fields = dict(ast.iter_fields(function))
    return ast.FunctionDef(**fields | {"body": function.body[1:], "decorator_list": []}, lineno=1)


def _parameters(reply: str) -> tuple[str, str] | None:
    """The name and the parameters of the function that a reply defines, perhaps between marks of a code block."""
    fenced = re.search(r"```(?:python)?\n(.*?)```", reply, flags=re.DOTALL)
    try:
        module = ast.parse(fenced[1] if fenced else reply)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    return (functions[0].name, ast.unparse(functions[0].args)) if functions else None


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text).strip("“”\"'《》。.")
