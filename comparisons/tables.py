"""Tables of text cells: plain for the screen, Markdown for the disk."""

from __future__ import annotations

from collections.abc import Sequence


def align(cells: Sequence[Sequence[str]]) -> str:
    """Return a plain table, first line underlined: first column left, the others right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines: list[str] = []
    for line in cells:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *numbers]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: first column left, the others right."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    lines.insert(1, "| --- |" + " ---: |" * (len(cells[0]) - 1))
    return "\n".join(lines)
