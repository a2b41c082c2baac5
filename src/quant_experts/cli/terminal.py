"""How commands speak to people: results on stdout, notes and progress on stderr, nothing that would steer a
terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quant_experts.errors import printable

console = Console()
errors = Console(stderr=True)


def plain(text: str) -> str:
    """Text that rich prints as it is, without control characters."""
    from rich.markup import escape

    return escape(printable(text))


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with time left, on stderr, as a function of (done, all, what)."""
    silence_transformers()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, disable=quiet or not errors.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=plain(f"{title} {what}".strip())
        )


def silence_transformers() -> None:
    """Our own progress bar is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
