"""Plain tables: aligned on a terminal, tab-separated in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table; the last column wraps on a terminal."""
    if not sys.stdout.isatty():
        for cells in rows:
            print("\t".join(cells))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        shown.add_column(head, no_wrap=head != heads[-1])
    for cells in rows:
        shown.add_row(*cells)
    Console().print(shown)
