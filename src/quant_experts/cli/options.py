"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from quant_experts.config import RECIPES, SCOPES

ModelArgument = Annotated[str, typer.Argument(help="Folder or Hugging Face name of the model.")]
SchemeOption = Annotated[
    str,
    typer.Option(
        help="Weight and activation bits: W4A6, W4A8, W3A16, W4A16g64-sym, W4Afp8 ... (A16: weights only; Afp8: 8-bit "
        "floating point, with weights of at most 4 bits)."
    ),
]
RecipeOption = Annotated[str, typer.Option(help=f"How the error is repaired: {', '.join(RECIPES)}.")]
ScaleOption = Annotated[
    bool, typer.Option(help="Scale ranks and channel counts with the model's width (the paper's at width 1536).")
]
ScopesOption = Annotated[str, typer.Option(help=f"Comma-separated parts to quantize: {', '.join(SCOPES)}.")]
SeedOption = Annotated[int, typer.Option(help="Makes a run repeatable.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines, and nothing else on stdout.")
]


def listed(text: str) -> list[str]:
    """What stands between commas, without the spaces around it."""
    return [part.strip() for part in text.split(",")]
