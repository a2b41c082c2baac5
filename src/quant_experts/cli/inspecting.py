"""`inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from quant_experts.cli.options import JsonOption
from quant_experts.cli.terminal import console, plain


def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a quantized checkpoint holds: scheme, recipe, groups, stored bits, errors; checks every file on the
    way."""
    from quant_experts.checkpoint.inspection import inspect_checkpoint

    result: dict[str, Any] = inspect_checkpoint(model)
    if as_json:
        print(json.dumps(result))
        return
    console.print(
        f"[bold]{plain(str(model))}[/]: {result['scheme']}, recipe {result['recipe']}, format "
        f"{result['format_version']}, "
        f"{len(result['groups'])} groups, {result['bits_per_weight']:.2f} stored bits per weight, "
        f"{result['bytes'] / 2**20:,.1f} MiB in all."
    )
    table = Table("group", "N x K", "shared", "routed", "bits", "error", "RTN error")
    for group in result["groups"]:
        names = plain(group["linears"][0]) + (f" +{len(group['linears']) - 1}" if len(group["linears"]) > 1 else "")
        routed = f"{group['experts']} x {group['routed_rank']}" if group["experts"] else "-"
        figures = [f"{group[key]:.2e}" if group.get(key) is not None else "-" for key in ("error", "rtn_error")]
        shape = f"{group['shape'][0]} x {group['shape'][1]}"
        table.add_row(names, shape, str(group["shared_rank"] or "-"), routed, f"{group['bits']:.2f}", *figures)
    console.print(table)
