"""The same numbers for a console: plain text where there is no terminal, and never cut off.

A table that is wider than the console is split into blocks of columns, each with the names of the runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from leakfree.report import finding, tables
from leakfree.report.measures import HEADLINE, LEAK, Group
from leakfree.report.runs import Variant, by_task
from leakfree.report.words import words_of

__all__ = ["print_comparison"]

_BOX, _MASK, _GAP, _ACCURACY, _ACCURACY_GAP, _INFLUENCE, _OF_IMAGES, _KNN, _LINEAR, _PRETEXT, _LOSS, _COST = HEADLINE
_ROI, _, _PAIRS, _, _, _PROBE, _SWAP, _OF_QUERIES = LEAK
_GROUPS = [
    Group("Box AP", _BOX.measures),
    Group("Mask AP", _MASK.measures),
    Group("RoI acc.", _ROI.measures[:3]),
    Group("RoI gap", _GAP.measures),
    Group("Pairs", _PAIRS.measures),
    _ACCURACY,
    Group("Gap", _ACCURACY_GAP.measures),
    Group("Influence", _INFLUENCE.measures),
    Group("Influence", _OF_IMAGES.measures),
    Group("kNN", _KNN.measures),
    Group("Linear", _LINEAR.measures),
    Group("Pretext", (*_PRETEXT.measures, *_LOSS.measures)),
    Group("Probe", _PROBE.measures),
    Group("Swap", _SWAP.measures),
    Group("Influence", _OF_QUERIES.measures),
    Group("Cost", _COST.measures),
]
_HEADS = {
    "(a) per image": "(a)",
    "(d) one class": "(d)",
    "(b) random groups": "(b)",
    "(c) population": "(c)",
    "running averages": "run.",
    "target domain": "targ.",
    "mixture of domains": "mix.",
    "(a) − (b)": "(a)−(b)",
    "(a) − (c)": "(a)−(c)",
    "(d) − (b)": "(d)−(b)",
    "(d) − (c)": "(d)−(c)",
    "same class": "same",
    "difference": "diff.",
    "in an image": "in img",
    "between images": "betw.",
    "in a class": "in cls",
    "between classes": "betw.",
    "same mates": "same",
    "other mates": "other",
    "same − other": "gap",
    "loss fallen, %": "fall.",
    "key moves by": "moves",
    "in a group": "in grp",
    "between groups": "betw.",
    "s per step": "s/step",
    "peak memory, MiB": "MiB",
}
_NAME_WIDTH = 24
_PADDING = 2  # between columns: one sign of padding, one of the table's divider
_ASCII = str.maketrans({"−": "-", "–": "-", "°": "o", "“": '"', "”": '"'})


@dataclass(frozen=True)
class _Column:
    group: str
    head: str
    cells: list[str]  # one per variant, up to a few lines each

    @property
    def width(self) -> int:
        lines = [self.group, self.head, *(line for cell in self.cells for line in cell.splitlines())]
        return max(map(cell_len, lines)) + _PADDING


def print_comparison(variants: Sequence[Variant], console: Console, baseline: Variant | None = None) -> None:
    """Print the finding, the tables, and what to mind, for each task: the numbers of the page."""
    tasks = by_task(variants)
    for number, (task, members) in enumerate(tasks.items()):
        if len(tasks) > 1:
            _print(console, "\n" * (number > 0) + f"== {task} ==", style="bold")
        _print_task(members, console, next((item for item in members if item is baseline), None))


def _print_task(variants: Sequence[Variant], console: Console, baseline: Variant | None) -> None:
    table = tables.select(_GROUPS, variants, baseline)
    found = finding.find(variants, baseline)
    _print(console, found.headline.striptags(), style="bold")
    columns = [
        _Column(group.head, _HEADS.get(measure.head, measure.head), [])
        for group in table.groups
        for measure in group.measures
    ]
    for row in table.rows:
        for column, cell in zip(columns, row.cells, strict=True):
            column.cells.append(_text(cell))
    if variants[0].task == "contrastive":
        for part in tables.normalized_parts(variants):
            words = [tables.normalized_together(variant, part).replace(", ", ",\n") for variant in variants]
            columns.append(_Column("Together", part, words))
    names = [variant.label + (" (unfinished)" if not variant.finished else "") for variant in variants]
    name_width = min(_NAME_WIDTH, max(map(cell_len, ["run", *names]))) + _PADDING
    for block in _blocks(columns, console.width - name_width):
        width = max(console.width, name_width + sum(column.width for column in block))
        console.print(_block(names, name_width, block, console), width=width, crop=False)
    blind = any(cell.is_blind for row in table.rows for cell in row.cells)
    _print(
        console,
        f"{words_of(variants[0].task).console}\n* best   ! leak   ° stored statistics stand in for precise ones"
        + "   ? near the loss of features that tell nothing" * blind,
    )
    if any(column.head in ("targ.", "mix.") for column in columns):
        _print(console, "targ.: statistics of the target domain (AdaBN); mix.: mixture of domains (BN embeddings)")
    if baseline is not None and any(cell.delta for row in table.rows for cell in row.cells):
        _print(console, f"Signed, below a number: difference from {baseline.label}, and its range over equal seeds")
    for number, entry in enumerate(tables.footnotes(variants), start=1):
        _print(console, f"[{number}] {'; '.join(entry)}")
    for sentence in (*found.sentences, *finding.cautions(variants)):
        _print(console, f"- {sentence.striptags()}")


def _text(cell: tables.Cell) -> str:
    """A number with its marks, and below it the range over seeds and the difference from the baseline."""
    if cell.value is None:
        return f"n.a.[{cell.footnote}]" if cell.footnote else "n.a."
    marks = "°" * cell.stands_in + "*" * cell.is_best + "!" * cell.is_leak + "?" * cell.is_blind
    lines = (cell.text + marks, cell.range, cell.delta, cell.delta_range, cell.partial)
    return "\n".join(line for line in lines if line)


def _blocks(columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """Cut the columns into blocks of at most ``width``, between groups where a whole group fits."""
    groups: dict[str, list[_Column]] = {}
    for column in columns:
        groups.setdefault(column.group, []).append(column)
    block: list[_Column] = []
    for group in groups.values():
        pieces = [group] if sum(column.width for column in group) <= width else [[column] for column in group]
        for piece in pieces:
            if block and sum(column.width for column in (*block, *piece)) > width:
                yield block
                block = []
            block = [*block, *piece]
    if block:
        yield block


def _block(names: Sequence[str], name_width: int, columns: Sequence[_Column], console: Console) -> RichTable:
    heads = [Column("run", min_width=name_width - _PADDING, max_width=name_width - _PADDING, overflow="fold")]
    groups = [column.group for column in columns]
    for position, column in enumerate(columns):
        group = column.group if groups.index(column.group) == position else ""
        text = _plain(f"{group}\n{column.head}", console)
        heads.append(
            Column(Text(text, justify="right"), justify="right", no_wrap=True, min_width=column.width - _PADDING)
        )
    table = RichTable(*heads, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _PADDING - 1, 0, 0), show_edge=False)
    for index, name in enumerate(names):
        cells = [Text(_plain(column.cells[index], console)) for column in columns]
        table.add_row(Text(_plain(name, console)), *cells)
    return table


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(_plain(text, console), style=style), soft_wrap=not console.is_terminal)


def _plain(text: str, console: Console) -> str:
    """What the console can show: no control characters, no signs its encoding lacks."""
    text = text.replace("\N{NO-BREAK SPACE}", " ")  # which does not count as printable
    text = "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)
    if not console.encoding.lower().startswith("utf"):
        text = text.translate(_ASCII)
    return text.encode(console.encoding, "replace").decode(console.encoding)
