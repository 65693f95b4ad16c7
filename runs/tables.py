"""Tables of results: line by line on a terminal as they come, or whole, in markdown for docs."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Value = str | float | None
Row = Mapping[str, Value]


class Column(NamedTuple):
    heading: str
    form: str = ""  # of a number, as in f"{value:{form}}"
    width: int = 0  # on a terminal, at least; the heading always fits


class Table:
    """Columns by the names that rows have for them; a row may lack some, and have others that are not shown."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = columns

    def heading(self) -> str:
        return self._aligned(column.heading for column in self.columns.values())

    def line(self, row: Row) -> str:
        return self._aligned(self.cells(row))

    def markdown(self, rows: Iterable[Row]) -> str:
        """For docs. Text is aligned to the left, numbers to the right."""
        marks = ["---:" if column.form else "---" for column in self.columns.values()]
        lines = [[column.heading for column in self.columns.values()], marks, *(self.cells(row) for row in rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def cells(self, row: Row) -> list[str]:
        return [written(row.get(name), column.form) for name, column in self.columns.items()]

    def _aligned(self, cells: Iterable[str]) -> str:
        columns = self.columns.values()
        return " ".join(
            f"{cell:{'>' if column.form else '<'}{max(column.width, len(column.heading))}}"
            for cell, column in zip(cells, columns, strict=True)
        ).rstrip()


def written(value: Value, form: str) -> str:
    """A cell's text; a dash where there is no value."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)
