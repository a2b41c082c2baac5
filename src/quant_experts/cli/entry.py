"""The commands as one program, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from quant_experts import __version__
from quant_experts.cli.answering import ask, evaluate
from quant_experts.cli.comparing import compare, demo
from quant_experts.cli.inspecting import inspect
from quant_experts.cli.quantizing import quantize
from quant_experts.cli.terminal import console, errors, plain
from quant_experts.errors import INTERRUPTED, QuantExpertsError

app = typer.Typer(
    name="quant-experts",
    help="Shrink vision-language models: quantized weights, and low-rank experts that repair the error.\n\n"
    "Start with `quant-experts demo`, which needs no network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point: bad input becomes one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except QuantExpertsError as error:
        errors.print(f"[bold red]Error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this exit
            errors.print("Interrupted; the same call goes on where this one stopped.", soft_wrap=True)
        raise


def _show_version(value: bool) -> None:
    if value:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    return  # all that its option does happens in the option's own callback


# In the order of the help.
app.command()(quantize)
app.command()(demo)
app.command()(compare)
app.command("eval")(evaluate)
app.command()(ask)
app.command()(inspect)
