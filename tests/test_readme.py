"""What the documents tell people to type exists: experiments, flags, config keys, make targets, links, numbers."""

import re
import shlex
from pathlib import Path

import pytest

from experiments import runner
from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import presets
from tests import commands

ROOT = runner.REPOSITORY
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)


def lines_of_commands(document: Path) -> list[str]:
    """Every line of an indented or fenced block or of inline code, joined where it ends with a backslash."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    inline = [
        code for line in text.splitlines() if not line.startswith("    ") for code in re.findall("`([^`]+)`", line)
    ]
    return [*text.splitlines(), *inline]


def experiment_commands(document: Path) -> list[tuple[list[str], str]]:
    """All `python -m experiments.X`: the arguments, the module's name first, and the error that is shown below them."""
    lines = [line.strip() for line in lines_of_commands(document)]
    found = []
    for line, below in zip(lines, [*lines[1:], ""]):
        command = line.removeprefix("$ ").removeprefix(".venv/bin/")
        if command.startswith("python -m experiments.") and "experiments.NAME" not in command:
            error = below.removeprefix("error: ") if below.startswith("error: ") else ""
            found.append((shlex.split(command)[2:], error))
    return found


COMMANDS = [(path, *command) for path in DOCUMENTS for command in experiment_commands(path)]


def test_the_readme_has_commands_to_check():
    names = {argv[0] for path, argv, _ in COMMANDS if path == ROOT / "README.md"}
    assert names >= {f"experiments.{name}" for name in ("train_tokenizer", "prepare_data", "pretrain", "generate")}


@pytest.mark.parametrize(("path", "argv", "error"), COMMANDS, ids=[f"{p.name}: {' '.join(a)}" for p, a, _ in COMMANDS])
def test_experiments_and_their_flags_exist(path, argv, error):
    if "--help" in argv:
        return
    try:
        commands.parse(argv)
    except UserError as mistake:
        assert runner.describe(mistake) == error  # the mistake that the document shows, to the letter


def test_a_wrong_flag_or_key_would_be_noticed():
    with pytest.raises(UserError, match=r"did you mean 'config\.model\.num_layers'"):
        commands.parse(["experiments.pretrain", "--config.model.layers=3"])
    with pytest.raises(UserError, match="unknown flag --wrkdir"):
        commands.parse(["experiments.pretrain", "--wrkdir=x"])
    with pytest.raises(ImportError):
        commands.parse(["experiments.pretrian"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path):
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    asked = {line.split()[1] for line in map(str.strip, lines_of_commands(path)) if re.match(r"make [\w-]+$", line)}
    assert asked <= targets
    assert path != ROOT / "README.md" or {"demo", "test"} <= asked


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    configs = re.findall(r"configs/\w+/\w+\.(?:py|json)", text)
    assert missing + [name for name in configs if not (ROOT / name).is_file()] == []


def test_python_in_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def rows_of_presets() -> dict[str, list[str]]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_preset_is_in_the_readme_with_its_count():
    rows = rows_of_presets()
    assert set(rows) >= set(presets.PRESETS)
    for name, config in presets.PRESETS.items():
        count = models.count_parameters(config)
        if name.startswith("baichuan2_sweep"):
            count -= 2 * config.vocab_size * config.hidden_size
            assert rows[name][-1] == f"{round(count / 1e6, 2):.2f}"  # the report's own figure
        elif name != "llama2_34b":
            assert rows[name][-1] == f"{count:,}"
        assert f"{count:,}" in rows[name]
