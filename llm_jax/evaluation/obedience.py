"""How long models keep to an instruction: shares of replies by turn, as a table of LLaMA-2's and as figures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm_jax.evaluation.attention_map import INSTRUCTION, Attention
from llm_jax.evaluation.figures import DOTS_PER_INCH, SERIES, figure, legend_beside
from llm_jax.evaluation.rewards import Proportion, percent
from llm_jax.evaluation.tables import Table

Shares = Mapping[int, Proportion]  # of the replies at a turn, those that keep to the instruction; turns from 1 on
FIRST_REPLY = INSTRUCTION + 2  # a part of `evaluation.attention_map`
MOST_NAMES = 24  # of parts that a map has room to name


def shares(obeyed: Sequence[Sequence[bool]]) -> dict[int, Proportion]:
    """By turn, of dialogues of one length."""
    return {turn: Proportion(float(sum(right)), len(right)) for turn, right in enumerate(zip(*obeyed), start=1)}


def table(title: str, models: Mapping[str, Sequence[Shares]], turns: Sequence[int], notes: Sequence[str] = ()) -> Table:
    """Turns by models in the shape of LLaMA-2's table 30; `models` maps a name to its runs, one for each seed."""
    rows = tuple((str(turn), *(percent([run[turn] for run in runs]) for runs in models.values())) for turn in turns)
    return Table(title, ("turn", *models), rows, frozenset(("turn", *models)), tuple(notes))


def draw(models: Mapping[str, Sequence[Shares]], path: Path) -> None:
    """Obedience over all turns, a line for each model: the mean over seeds, and its standard error as a band."""
    with figure(path, 8.5, 4.2, "Replies that keep to the first message's instruction") as axes:
        for number, (name, runs) in enumerate(models.items()):
            turns = sorted(runs[0])
            values = [[100 * run[turn].share for run in runs] for turn in turns]
            means = np.array([statistics.fmean(each) for each in values])
            errors = np.array([statistics.stdev(each) / math.sqrt(len(each)) if runs[1:] else 0.0 for each in values])
            colour = SERIES[number % len(SERIES)]
            line = "-" if number < len(SERIES) else "--"
            axes.plot(turns, means, line, marker="o", color=colour, markersize=3, label=name)
            axes.fill_between(turns, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("turn")
        axes.set_ylabel("obeyed (%)")
        axes.set_ylim(-2, 102)
        legend_beside(axes)


def instruction_share(found: Attention) -> np.ndarray:
    """How much of their attention the tokens of each reply give to the instruction, [L, turns]: the heads' mean."""
    return found.mass[:, :, FIRST_REPLY::2, INSTRUCTION].mean(axis=1)


def draw_attention(models: Mapping[str, Attention], path: Path) -> None:
    """Where replies look, before and after: LLaMA-2's figure 10, and the instruction's share by layer and turn.

    Above, the largest probability in the whole network between a reply and any earlier part of the dialogue, as in the
    paper; below, the mean share of a reply's attention that the instruction gets, by layer.
    """
    canvas = Figure(figsize=(1 + 4.2 * len(models), 8.2), layout="constrained")
    grid = canvas.subplots(2, len(models), squeeze=False)
    layers = {name: instruction_share(found) for name, found in models.items()}
    most = max(float(values.max()) for values in layers.values())
    for (above, below), (name, found) in zip(grid.T, models.items()):
        largest = found.largest.max(axis=(0, 1))[FIRST_REPLY::2]
        turns = range(1, len(largest) + 1)
        seen = np.arange(largest.shape[1]) <= FIRST_REPLY + 2 * np.arange(len(largest))[:, None]
        image = above.imshow(np.where(seen, largest, np.nan), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        above.set_title(name, loc="left", fontsize=11)
        above.set_yticks(range(len(turns)), [str(turn) for turn in turns])
        names = part_names(largest.shape[1])
        shown = range(0, len(names), 1 if len(names) <= MOST_NAMES else 2)
        above.set_xticks(shown, [names[part] for part in shown], rotation=90, fontsize=7)
        above.set_ylabel("reply")
        lower = below.imshow(100 * layers[name], aspect="auto", cmap="magma", vmin=0, vmax=100 * most, origin="lower")
        counted = range(0, len(turns), 1 if len(names) <= MOST_NAMES else 2)
        below.set_xticks(counted, [str(turns[reply]) for reply in counted])
        below.set_xlabel("reply")
        below.set_ylabel("layer")
        below.yaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.colorbar(image, ax=grid[0].tolist(), label="largest attention probability")
    canvas.colorbar(lower, ax=grid[1].tolist(), label="share given to the instruction (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=DOTS_PER_INCH)


def part_names(count: int) -> list[str]:
    """The first parts of a dialogue, as `evaluation.attention_map` numbers them."""
    spoken = [f"{who} {turn}" for turn in range(1, count + 1) for who in ("question", "reply")]
    return ["before", "instruction", *spoken][:count]
