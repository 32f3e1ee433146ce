"""A progress bar around an iterator of verdicts."""

from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flexjudge_fast.verdict import Verdict


def with_progress(verdicts: Iterator[Verdict], total: int | None) -> Iterator[Verdict]:
    """Pass verdicts on; draw on stderr, so that a piped stdout stays clean."""
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("judging", total=total)
        for verdict in verdicts:
            bar.advance(task)
            yield verdict
