"""Samples of using tools as a person makes them: written in batches, judged, continued after a stop, and mistakes."""

import dataclasses
import json

import pytest

from experiments import runner, self_instruct
from llm_jax.alignment import conversations, instructions, tool_use
from llm_jax.alignment.config import SelfInstructConfig
from llm_jax.alignment.tool_use import Outcome
from llm_jax.config import SamplingConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.sampling.text import Completion
from tests.alignment import base_models

HERE = runner.REPOSITORY / "configs" / "self_instruct"
SEEDS = tool_use.read_samples(HERE / "seeds.jsonl")
TOOLS = tool_use.read_tools(HERE / "tools.jsonl")


def config(**changes):
    settings = SelfInstructConfig(
        model="some", tools=str(HERE / "tools.jsonl"), seeds=str(HERE / "seeds.jsonl"), count=20, batch_size=8,
        holdout_fraction=0.3,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


class Model:
    """Writes a good sample of the tool that it is asked for, but nonsense in every fifth, and notes its prompts."""

    def __init__(self, stop_after=1000):
        self.batches, self._stop_after = [], stop_after

    def __call__(self, config):
        def finish(prompts, first):
            if len(self.batches) == self._stop_after:
                raise KeyboardInterrupt
            self.batches.append(prompts)
            return [self._write(prompt, first + i) for i, prompt in enumerate(prompts)]

        return finish

    def _write(self, prompt, number):
        name = prompt.splitlines()[-2].removeprefix("Tool: ")
        sample = next(seed for seed in SEEDS if seed.tool == name)
        text = str(dataclasses.replace(sample, question=f"Number {number}?"))
        return "Sorry." if number % 5 == 4 else text.removeprefix("Question:")


@pytest.fixture
def model(monkeypatch):
    found = Model()
    monkeypatch.setattr(self_instruct, "model_of", found)
    return found


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_seeds_and_tools_of_the_project_obey_the_rules():
    tools = {tool.name: tool for tool in TOOLS}
    assert len(tools) == 8 and len(SEEDS) == 24
    for seed in SEEDS:
        tool_use.check(seed, tools[seed.tool])
        assert tool_use.parse(str(seed)) == seed
    assert {seed.tool for seed in SEEDS} == set(tools)


def test_kept_samples_are_conversations_and_exercises(model, tmp_path):
    self_instruct.run(config(), tmp_path)
    assert [len(batch) for batch in model.batches] == [8, 8, 4]
    sides = [conversations.read(tmp_path / side)[0] for side in ("train", "heldout")]
    assert [len(side) for side in sides] == [16 - len(sides[1]), len(sides[1])] and len(sides[1]) > 1
    asked = [message.content for side in sides for each in side for message in each.messages if message.role == "user"]
    assert {f"Number {i}?" for i in range(20) if i % 5 != 4} <= set(asked)
    calls = instructions.read_exercises(tmp_path / "exercises.jsonl")
    assert [call.conversation.messages for call in calls] == [each.messages[:3] for each in sides[1]]
    assert all(tool_use.call(call.answer) for call in calls)


def test_the_report_counts_by_tool_and_rule(model, tmp_path, capsys):
    self_instruct.run(config(), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    counts = found["by_tool"]
    assert found["written"] == 20 and sum(each.get("kept", 0) for each in counts.values()) == 16
    assert sum(each.get(tool_use.UNPARSABLE, 0) for each in counts.values()) == 4
    assert counts["weather"] == {"kept": 3} and counts["set_timer"] == {"kept": 1, tool_use.UNPARSABLE: 1}
    assert found["first"] == {tool_use.UNPARSABLE: "sample 5: fields Question"}
    assert "| all | 20 | 16 | 80.0 | 4 | 0 | 0 | 0 |" in (tmp_path / "report.md").read_text()
    assert "16" in capsys.readouterr().out


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(model, tmp_path, monkeypatch):
    self_instruct.run(config(), tmp_path / "straight")
    monkeypatch.setattr(self_instruct, "model_of", Model(stop_after=2))
    with pytest.raises(KeyboardInterrupt):
        self_instruct.run(config(), tmp_path / "stopped")
    with (tmp_path / "stopped" / self_instruct.WRITTEN).open("a") as file:
        file.write('{"prompt": 12')  # as a full disk would leave it
    again = Model()
    monkeypatch.setattr(self_instruct, "model_of", again)
    self_instruct.run(config(), tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    assert [len(batch) for batch in again.batches] == [4]


def test_more_samples_are_added_to_those_there_are(model, tmp_path):
    self_instruct.run(config(count=16), tmp_path)
    self_instruct.run(config(count=24), tmp_path)
    self_instruct.run(config(count=24), tmp_path)  # nothing is left to write
    assert [len(batch) for batch in model.batches] == [8, 8, 8]
    assert json.loads((tmp_path / "report.json").read_text())["written"] == 24


def test_a_real_model_draws_every_batch_anew(tmp_path, monkeypatch):
    """A random model writes no sample; its texts differ between equal prompts of two batches, and are drawn again."""
    monkeypatch.setattr(self_instruct, "whole_lines", lambda completion: completion.completion)
    base = base_models.make(tmp_path / "model", dataclasses.replace(base_models.MODEL, max_length=2048))
    settings = config(model=str(base), sampling=SamplingConfig(max_new_tokens=8))
    finish = self_instruct.model_of(settings)
    first = finish(["one two"] * 2, 0)
    assert finish(["one two"] * 2, 0) == first != finish(["one two"] * 2, 2)
    assert first[0] != first[1]
    greedy = self_instruct.model_of(dataclasses.replace(settings, sampling=SamplingConfig(8, temperature=0.0)))
    assert len(set(greedy(["one two"] * 2, 0) + greedy(["one two"], 2))) == 1
    assert pretrained.is_run(base)
    with pytest.raises(UserError, match=r"keep none of 2 samples: 2 not parsable \(first sample 1"):
        self_instruct.run(dataclasses.replace(settings, count=2), tmp_path / "out")


def test_a_line_in_which_the_model_was_cut_is_left_out():
    assert self_instruct.whole_lines(Completion("p", "a\nb", 3, "stop")) == "a\nb"
    assert self_instruct.whole_lines(Completion("p", "a\nb", 3, "length")) == "a"


def test_a_sample_is_counted_at_one_rule():
    outcomes = [Outcome("a", SEEDS[0]), Outcome("a", None, tool_use.DUPLICATE, "x"), Outcome("b", None, "another tool")]
    assert self_instruct.tally(outcomes).counts == {tool_use.DUPLICATE: 1, "another tool": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "set --config.model"),
        ({"tools": ""}, "set --config.tools"),
        ({"seeds": "nowhere.jsonl"}, "no file or folder at nowhere.jsonl"),
        ({"seeds": str(HERE / "tools.jsonl")}, "holds what is no sample|has no sample to learn from"),
        ({"seed": 1}, "holds samples of another seed"),
        ({"shown": 2}, "holds samples of another shown"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, changes, message):
    self_instruct.run(config(), tmp_path)
    with pytest.raises(UserError, match=message) as error:
        self_instruct.run(config(**changes), tmp_path)
    assert "\n" not in runner.describe(error.value)


def test_other_tools_in_the_same_file_are_noticed(model, tmp_path):
    tools = tmp_path / "tools.jsonl"
    tools.write_text((HERE / "tools.jsonl").read_text())
    self_instruct.run(config(tools=str(tools)), tmp_path / "run")
    tools.write_text(tools.read_text().replace("The forecast", "A forecast"))
    with pytest.raises(UserError, match="with other tools or seeds"):
        self_instruct.run(config(tools=str(tools)), tmp_path / "run")
    damaged = tmp_path / "run" / self_instruct.WRITTEN
    damaged.write_text("{}\n" + damaged.read_text())
    with pytest.raises(UserError, match=r"written.jsonl:1 is damaged"):
        self_instruct.run(config(tools=str(tools)), tmp_path / "run")
