"""Tables 1-6 and 8 in the paper's rows and columns; every cell holds ours and the paper's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.measuring import OFF, Measured, Measurer
from isw_plugin import CVGate, Gate, MinNorm, RandomGate

__all__ = ["TABLES", "Table", "markdown"]

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
NAMES = {
    "vgg16": "VGG16",
    "resnet18": "Res18, no max-pool",
    "resnet18-pooled": "Res18",
    "mobilenetv2": "MNet2",
    "vgg16-bn-l1": "VGG16, BN-L1",
    "slimmed-vgg16": "VGG16, slimmed",
    "mobilenetv2-imagenet": "MNet2",
}
ALSO = ("vgg16-bn-l1", "slimmed-vgg16")  # networks of as many layers that the paper has no such rows for
SITES = {"conv1_1": 0, "conv3_1": 4, "conv5_1": 10, "conv5_3": 12}  # of VGG16's thirteen, in order


Pair = tuple[float, float]  # alpha, beta


@dataclass(frozen=True)
class Row:
    """Column by column: ours (None: not run), the paper's (None: not in it), and what is behind ours."""

    label: str
    ours: list[float | None]
    paper: list[float | None]
    measured: list[Measured | None]

    def completed(self, other: "Row") -> "Row":
        """Itself, with the cells of another where it has not run."""

        def cells(part: str) -> list[Any]:
            both = zip(self.ours, getattr(self, part), getattr(other, part), strict=True)
            return [mine if value is not None else its for value, mine, its in both]

        return Row(self.label, cells("ours"), cells("paper"), cells("measured"))

    def spread(self, columns: list[str], wider: list[str]) -> "Row":
        """The row of these columns in a table that has more; None there."""

        def cells(values: list[Any]) -> list[Any]:
            held = dict(zip(columns, values, strict=True))
            return [held.get(column) for column in wider]

        return Row(self.label, cells(self.ours), cells(self.paper), cells(self.measured))


@dataclass(frozen=True)
class Table:
    title: str
    corner: str
    columns: list[str]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what is behind a cell without its sites."""
        shown = ("gate", "accuracy", "prune_ratio", "macs_saved", "emptied", "instances", "date", "same_ratio")
        rows = [
            {
                "label": row.label,
                "ours": row.ours,
                "paper": row.paper,
                "measured": [m and {name: m[name] for name in shown if name in m} for m in row.measured],
            }
            for row in self.rows
        ]
        return {"title": self.title, "corner": self.corner, "columns": self.columns, "rows": rows}

    def with_stored(self, stored: dict[str, Any]) -> "Table":
        """Itself, with what an earlier run's ``to_dict`` has and this one has not run; ``self`` if that is nothing.

        Raises:
            ValueError: Each of the tables has columns that the other lacks.
        """
        columns = max(self.columns, stored["columns"], key=len)
        if not {*self.columns, *stored["columns"]} <= set(columns):
            raise ValueError(f"the stored table has columns {stored['columns']}, this one {self.columns}")
        before = [row.spread(self.columns, columns) for row in self.rows]
        rows = {row.label: row for row in before}
        others = [Row(**row).spread(stored["columns"], columns) for row in stored["rows"]]
        for row in others:
            own = rows.get(row.label, Row(row.label, *[[None] * len(columns)] * 3))
            if any(mine is None and other is not None for mine, other in zip(own.ours, row.ours, strict=True)):
                rows[row.label] = own.completed(row)
        if list(rows.values()) == before:
            return self
        order = dict.fromkeys(row.label for row in [*max(before, others, key=len), *rows.values()])
        return replace(self, columns=columns, rows=[rows[label] for label in order if label in rows])


def markdown(table: Table) -> str:
    """A line a row; a cell is ours and, in brackets, the paper's."""
    lines = [f"| {table.corner} | {' | '.join(table.columns)} |", "|---" * (len(table.columns) + 1) + "|"]
    for row in table.rows:
        cells = [_cell(*values) for values in zip(row.ours, row.paper, strict=True)]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(ours: float | None, paper: float | None) -> str:
    shown = "not run" if ours is None else f"{ours:.3f}"
    return shown if paper is None else f"{shown} ({paper:.3f})"


def _label(lambda_: float) -> str:
    return f"{lambda_:g}"


Subject = tuple[str, float]  # network, lambda


def _subjects(measurer: Measurer, table: str, network: str, more: Sequence[str] = ()) -> dict[str, Subject]:
    """Row label -> whose row: the paper's lambdas and any other that is trained, then other networks that are."""
    lambdas = sorted({float(value) for value in PUBLISHED[table]} | set(measurer.lambdas(network)))
    rows: dict[str, Subject] = {f"{value:g}": (network, value) for value in lambdas}
    for other in more:
        rows |= {f"{NAMES[other]}: {value:g}": (other, value) for value in measurer.lambdas(other)}
    return rows


def table1(measurer: Measurer) -> Table:
    published = PUBLISHED["table1"]
    networks = ("vgg16", "resnet18-pooled", "resnet18", "mobilenetv2", "vgg16-bn-l1", "slimmed-vgg16")
    trained = {lambda_ for network in networks for lambda_ in measurer.lambdas(network)}
    lambdas = sorted({0.0, 1e-8, 1e-7, 1e-6} | trained)
    rows = []
    for network in networks:
        measured = [measurer.at(network, lambda_, OFF) for lambda_ in lambdas]
        paper = [published.get(network, {}).get(_label(lambda_)) for lambda_ in lambdas]
        rows.append(Row(NAMES[network], [m and m["accuracy"] for m in measured], paper, measured))
    return Table("Accuracy with every channel", "Network", [f"λ = {value:g}" for value in lambdas], rows)


def table2(measurer: Measurer) -> Table:
    rows = []
    for label, subject in _subjects(measurer, "table2", "vgg16", ALSO).items():
        measured = measurer.at(*subject, OFF)
        values = list(measured["cv"].values()) if measured else None
        ours = [values[index] if values else None for index in SITES.values()]
        paper = PUBLISHED["table2"].get(label, [None] * len(SITES))
        rows.append(Row(label, ours, paper, [measured] * len(SITES)))
    return Table("Mean CV of some layers of VGG16", "λ", list(SITES), rows)


def table3(measurer: Measurer) -> Table:
    gates: list[tuple[str, Gate]] = [
        ("10 % rand", RandomGate(0.1)),
        ("10 % min", MinNorm(0.1)),
        ("20 % rand", RandomGate(0.2)),
        ("20 % min", MinNorm(0.2)),
        ("30 % min", MinNorm(0.3)),
        ("40 % min", MinNorm(0.4)),
    ]
    rows = []
    for label, subject in _subjects(measurer, "table3", "vgg16", ALSO).items():
        measured = [measurer.at(*subject, gate) for _, gate in gates]
        paper = PUBLISHED["table3"].get(label, [None] * len(gates))
        rows.append(Row(label, [m and m["accuracy"] for m in measured], paper, measured))
    return Table("Accuracy of VGG16 after dropping a fixed ratio of channels", "λ", [name for name, _ in gates], rows)


def _gated(measurer: Measurer, name: str, network: str, pairs: Sequence[Pair], title: str) -> Table:
    """Accuracy and prune ratio at some thresholds."""
    return _table(measurer, name, _subjects(measurer, name, network), pairs, title)


def _table(measurer: Measurer, name: str, subjects: dict[str, Subject], pairs: Sequence[Pair], title: str) -> Table:
    rows = []
    for label, subject in subjects.items():
        measured = [measurer.at(*subject, CVGate(*pair)) for pair in pairs]
        if name == "table4":
            measured = [m and m | {"same_ratio": _rival(measurer, subject, m)} for m in measured]
        ours = [m and m[part] for m in measured for part in ("accuracy", "prune_ratio")]
        published = PUBLISHED[name].get(label, [[None, None]] * len(pairs))
        paper = [value for pair in published for value in pair]
        rows.append(Row(label, ours, paper, [m for m in measured for _ in range(2)]))
    columns = [f"{alpha:g}, {beta:g}: {part}" for alpha, beta in pairs for part in ("acc", "pr")]
    return Table(title, "λ", columns, rows)


def _rival(measurer: Measurer, subject: Subject, measured: Measured) -> Measured | None:
    """Min-norm at the CV gate's ratio, for the JSON: it drops no more, since it rounds down at every site."""
    rival = measurer.at(*subject, MinNorm(round(measured["prune_ratio"], 4)))
    return rival and {part: rival[part] for part in ("gate", "accuracy", "prune_ratio", "macs_saved")}


def table4(measurer: Measurer) -> Table:
    pairs = ((0.5, 0.5), (0.5, 1.0), (1.0, 1.0))
    subjects = _subjects(measurer, "table4", "vgg16", ALSO)
    return _table(measurer, "table4", subjects, pairs, "The CV gate on VGG16, by alpha, beta")


def table5(measurer: Measurer) -> Table:
    pairs = ((1.5, 1.0), (1.25, 0.75), (1.0, 0.5))
    return _gated(measurer, "table5", "mobilenetv2", pairs, "The CV gate on MobileNetV2, by alpha, beta")


def table6(measurer: Measurer) -> Table:
    pairs = ((0.0, 0.0), (0.5, 1.0), (0.7, 0.7))
    return _gated(measurer, "table6", "slimmed-vgg16", pairs, "The CV gate on VGG16 after slimming, by alpha, beta")


def table8(measurer: Measurer) -> Table:
    pairs = ((0.0, 0.0), (1.0, 0.3), (0.8, 0.3))
    return _gated(measurer, "table8", "mobilenetv2-imagenet", pairs, "MobileNetV2 on ImageNet, by alpha, beta")


TABLES: dict[str, Callable[[Measurer], Table]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table8": table8,
}
