"""Results as a table of plain text, and how sure a mean is."""

import statistics
from collections.abc import Mapping, Sequence


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values: their sample standard deviation over sqrt(n); NaN for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def result_table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Rows (column -> value) as an aligned plain-text table without a final newline.

    Numbers stand to the right, floats with 4 significant digits; None and what a row lacks become "-".
    """

    def cell(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    values = [[row.get(column) for column in columns] for row in rows]
    numeric = [all(value is None or isinstance(value, (int, float)) for value in column) for column in zip(*values)]
    numeric = numeric or [False] * len(columns)
    cells = [list(map(str, columns)), *([cell(value) for value in line] for line in values)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)]
        for line in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
