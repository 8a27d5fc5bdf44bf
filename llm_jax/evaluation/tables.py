"""Tables of text: as Markdown for a file, as HTML for a page, and as Rich tables for a terminal."""

import dataclasses
import html
from collections.abc import Sequence

import rich.table
from rich.console import Group
from rich.text import Text

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()  # headings of the columns that are aligned to the right
    notes: tuple[str, ...] = ()  # lines below it


def quantity(value: float) -> str:
    """Three digits and the unit that people say: 11.5M, 3.02B."""
    value = float(f"{value:.3g}")
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def as_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, under a heading of the second level."""
    rule = ["---:" if heading in table.numbers else "---" for heading in table.headings]
    lines = [_line(table.headings), f"| {' | '.join(rule)} |", *map(_line, table.rows)]
    notes = "\n".join(f"- {escaped(note)}" for note in table.notes)
    return "\n".join([f"## {escaped(table.title)}", "", *lines, "", *([notes, ""] if notes else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def escaped(cell: str) -> str:
    """Text as Markdown that shows it as it is."""
    return " ".join(cell.split()).translate({ord(sign): f"\\{sign}" for sign in "\\|<*_`"})


def as_rich(table: Table) -> Group:
    """The table for a terminal, and its notes. Cells are `Text`: they show as they are, whatever brackets they hold."""
    drawn = rich.table.Table(title=Text(table.title), title_justify="left")
    for heading in table.headings:
        drawn.add_column(Text(heading), justify="right" if heading in table.numbers else "left")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return Group(drawn, *map(Text, table.notes))


def as_html(table: Table) -> str:
    """The table under a heading of the second level, its notes below it, in the classes of `report.STYLE`."""

    def cells(row: Sequence[str], tag: str) -> str:
        classes = (' class="number"' if heading in table.numbers else "" for heading in table.headings)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(classes, row))

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{cells(table.headings, 'th')}</tr>{rows}</table>{notes}"
