"""The experiment as its users run it, on a model that knows nothing: what is written, what is done once, mistakes."""

import dataclasses
import json

import pytest

from configs.ghost_attention import small, smollm2
from experiments import ghost_attention, runner
from llm_jax import config as config_lib
from llm_jax.alignment import constraints, instructions, sft
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.constraints import CONSTRAINTS
from llm_jax.alignment.conversations import Conversation
from llm_jax.alignment.ghost_attention_config import GhostAttentionConfig
from llm_jax.config import OptimizerConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Llama2, Message
from tests.alignment import base_models
from tests.tokenization.chat_tokenizers import Bytes

SAMPLING = SamplingConfig(max_new_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = dataclasses.replace(base_models.MODEL, max_length=1024)
    return base_models.make(tmp_path_factory.mktemp("base") / "model", model)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Conversations whose questions are short; their replies are not used."""
    file = tmp_path_factory.mktemp("data") / "asked.jsonl"
    replied = {"role": "assistant", "content": "one"}
    lines = [{"messages": [{"role": "user", "content": f"one {number}"}, replied]} for number in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(base, asked, **changes):
    training = FineTuneConfig(
        model=str(base),
        steps=2,
        eval_every=0,
        keep_best=False,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
    )
    config = GhostAttentionConfig(
        training=training,
        data=ChatDataConfig(template="llama2", sequence_length=256, batch_size=8, packed=False, holdout_fraction=0.0),
        questions=str(asked),
        constraints=("begin_well", "end_over", "capitals"),
        new_constraints=("end_please",),
        replies="mended",
        dialogues=8,
        turns=2,
        rounds=2,
        variants=("ghost",),
        seeds=(0,),
        judged_turns=(1, 2),
        judged_dialogues=2,
        mapped_dialogues=1,
        batch_size=8,
        sampling=SAMPLING,
        judging=SAMPLING,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def done(base, asked, tmp_path_factory):
    """A finished experiment, of which the stages are done one after the other."""
    folder = tmp_path_factory.mktemp("done") / "run"
    config = settings(base, asked)
    for stages in (["dialogues"], ["runs"], ["report"]):
        ghost_attention.run(config, folder, stages)
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_trained_on_has_its_instruction_once_and_ends_obeying(done):
    found = records(done / "dialogues" / "ghost.jsonl")
    assert len(found) == 8
    known = [CONSTRAINTS[name] for name in ("begin_well", "end_over", "capitals")]
    for record in found:
        first, *_, last = [message["content"] for message in record["messages"]]
        instruction, question = first.split("\n")
        asked_for = [c for c in known if c.instruction in instruction or c.short in instruction]
        assert asked_for and question.startswith("one ") and all(c.obeys(last) for c in asked_for)
        assert not any("\n" in message["content"] for message in record["messages"][2::2])


def test_the_report_counts_what_was_said(done):
    """Every number anew from the replies."""
    obeyed = json.loads((done / "report.json").read_text())["obedience"]
    assert set(obeyed) == {"base", "repeated", "ghost"}
    for name, (run,) in obeyed.items():
        said = records(done / name / "seed_0" / "replies.jsonl")
        assert len(said) == 8 and {record["kind"] for record in said} == set(run) - {"all", "said before"}
        for kind, shares in run.items():
            if kind == "said before":
                again = [record["said"][1] == record["said"][3] for record in said]
                assert shares == {"1": 0.0, "2": pytest.approx(sum(again) / len(again))}
                continue
            for turn in (1, 2):
                right = [
                    all(
                        CONSTRAINTS[each].obeys(record["said"][2 * turn - 1])
                        for each in record["constraints"].split(" + ")
                    )
                    for record in said
                    if kind in ("all", record["kind"])
                ]
                assert shares[str(turn)] == pytest.approx(sum(right) / len(right))
    assert (done / "report.md").read_text().count(
        "| 1 |"
    ) == 6  # all, four kinds of instruction, and what was said before


def test_what_is_judged_is_kept_apart_from_what_is_trained_on(done):
    trained = {
        message["content"].split("\n")[-1]
        for r in records(done / "dialogues" / "baseline.jsonl")
        for message in r["messages"][::2]
    }
    judged = records(done / "base" / "seed_0" / "replies.jsonl")
    assert not trained & {question for record in judged for question in record["said"][::2]}
    by_kind = {kind: [r for r in judged if r["kind"] == kind] for kind in {r["kind"] for r in judged}}
    assert all(record["constraints"] == "end_please" for record in by_kind["new constraints"])
    for record in by_kind["combined anew"]:
        assert constraints.is_held_out([CONSTRAINTS[name] for name in record["constraints"].split(" + ")])
    for record in by_kind["in other words"]:
        assert all(CONSTRAINTS[name].reworded in record["instruction"] for name in record["constraints"].split(" + "))


def test_models_are_asked_the_same(done):
    base, ghost = (records(done / name / "seed_0" / "replies.jsonl") for name in ("base", "ghost"))
    assert [(r["instruction"], r["said"][::2]) for r in base] == [(r["instruction"], r["said"][::2]) for r in ghost]


def test_what_is_done_is_not_done_again(base, asked, done, capsys):
    before = {
        path: path.stat().st_mtime_ns
        for path in done.rglob("*.json*")
        if "report" not in path.name and path.parent != done
    }
    ghost_attention.run(settings(base, asked, mapped_dialogues=0), done)
    said = capsys.readouterr().out
    assert said.count("done earlier") == 3 and "made earlier" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_figures_and_attention_are_written(done):
    assert all((done / name).read_bytes().startswith(b"\x89PNG") for name in ("obedience.png", "attention.png"))


def test_both_configs_are_valid():
    for values in (small.get_config(), smollm2.get_config(), smollm2.get_config("mended")):
        config_lib.from_config_dict(GhostAttentionConfig, values)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"turns": 3}, {}, "another turns"),
        ({}, {"only": ["ghost/7"]}, "--only"),
        ({}, {"stages": ["judge"]}, "--stages"),
    ],
    ids=["config", "only", "stages"],
)
def test_mistakes_with_a_folder_are_one_line(base, asked, done, change, options, message):
    with pytest.raises(UserError) as error:
        ghost_attention.run(settings(base, asked, **change), done, **options)
    assert message in str(error.value) and "\n" not in runner.describe(error.value)


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        ({}, "runs", "no dialogues yet"),
        ({}, "report", "is not judged yet"),
        ({"turns": 40}, "dialogues", "do not fit into the model's context of 1024"),
        ({"judged_turns": (1, 40)}, "dialogues", "do not fit into the model's context of 1024"),
        ({"replies": "sampled", "constraints": ("begin_well",)}, "dialogues", "keeps to its instruction"),
        ({"questions": "none.jsonl"}, "dialogues", "none.jsonl"),
    ],
    ids=["no dialogues", "no runs", "context", "context when judged", "never obeys", "questions"],
)
def test_mistakes_are_one_line(base, asked, tmp_path, change, stage, message):
    with pytest.raises(UserError) as error:
        ghost_attention.run(settings(base, asked, **change), tmp_path / "run", [stage])
    assert message in str(error.value) and "\n" not in runner.describe(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constraints": ("begin_wel",)}, "begin_wel"),
        ({"constraints": ("french",)}, "no rule makes a reply french"),
        ({"new_constraints": ("capitals",)}, "both trained on and new"),
        ({"constraints": ()}, r"constraints=\(\) must name at least one, and none of them twice"),
        ({"seeds": (1, 1)}, "must name at least one, and none of them twice"),
        ({"seeds": (0, -1)}, "must not be negative"),
        ({"judged_turns": (0, 2)}, "count from 1"),
        ({"data": ChatDataConfig(path="x", holdout_fraction=0.0)}, "are not used"),
        ({"turns": 0}, "turns"),
        ({"holdout_fraction": 1.0}, "holdout_fraction"),
        ({"mapped_dialogues": -1}, "mapped_dialogues"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings(base, asked, change, message):
    with pytest.raises(UserError, match=message):
        settings(base, asked, **change)


def test_nobody_learns_from_a_reply_that_was_not_to_be_the_last(base, asked, tmp_path):
    """A dialogue that is too long is left out: cut, it would end with a reply that perhaps disobeys."""
    (tmp_path / "dialogues").mkdir()
    long = [Message(("user", "assistant")[i % 2], "one" * 20) for i in range(6)]
    found = [Conversation(tuple(long[:2])), Conversation(tuple(long))]
    instructions.write(tmp_path / "dialogues" / "ghost.jsonl", found)
    config = ghost_attention.run_config(settings(base, asked), tmp_path, "ghost", 0).data
    data = sft.load(config, Llama2(Bytes()))
    assert [len(samples) for samples in data.train.values()] == [1] and data.tally.counts == {sft.TOO_LONG: 1}


def test_the_first_message_alone_tells_unless_all_do(base, asked, tmp_path, monkeypatch):
    """A model that obeys the message before it keeps to the instruction at the first turn only, or at all turns."""

    def reply(self, dialogues):
        return [f"Well {len(each)}" if "\n" in each[-1].content else f"no {len(each)}" for each in dialogues]

    monkeypatch.setattr(ghost_attention.Speaker, "reply", reply)
    config = settings(base, asked, constraints=("begin_well",), new_constraints=(), most_constraints=1)
    for name, shares in (("base", [1.0, 0.0]), ("repeated", [1.0, 1.0])):
        ghost_attention.judge(config, base, tmp_path / name, name, 0)
        found = ghost_attention.read_obedience(tmp_path / name)
        assert set(found) == {"all", "as trained", "in other words", "said before"}
        assert [found["all"][turn].share for turn in (1, 2)] == shares
