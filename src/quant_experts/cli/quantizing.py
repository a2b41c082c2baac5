"""`quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant_experts.cli.options import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    ScaleOption,
    SchemeOption,
    ScopesOption,
    SeedOption,
    listed,
)
from quant_experts.cli.terminal import console, errors, plain, progress_bar
from quant_experts.config import MAX_PIXELS

if TYPE_CHECKING:
    from quant_experts.calibration.memory import MemoryEstimate
    from quant_experts.pipeline import QuantizationResult

FULL_BITS = 16
"""Of a weight that is not quantized."""

SamplesArgument = Annotated[
    str,
    typer.Argument(
        help="Calibration samples: a JSON or JSONL file (ShareGPT4V form, chat messages, or image/question/answer), a "
        "folder of images with captions, or the name of a Hugging Face data set."
    ),
]


def quantize(
    model: ModelArgument,
    samples: SamplesArgument,
    output: Annotated[Path, typer.Argument(help="Folder to create. Repeat the call to resume an interrupted run.")],
    scheme: SchemeOption = "W4A6",
    recipe: RecipeOption = "quant-experts",
    limit: Annotated[int, typer.Option(help="Use at most this many samples.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Longest sample in tokens; longer answers are cut.")] = 2048,
    max_pixels: Annotated[int, typer.Option(help="Scale larger images down to this area.")] = MAX_PIXELS,
    scale_ranks: ScaleOption = False,
    scopes: ScopesOption = "language",
    seed: SeedOption = 0,
    device: DeviceOption = None,
    strict: Annotated[bool, typer.Option(help="Stop where a layer is left out or a computation falls back.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model and write a checkpoint that `from_pretrained` loads.

    Example: `quant-experts quantize Qwen/Qwen2-VL-2B-Instruct captions.json qwen2-vl-2b-w4a6`
    """
    from quant_experts.config import QuantizationConfig
    from quant_experts.pipeline import quantize as run

    limits = dict(samples=limit, max_tokens=max_tokens, max_pixels=max_pixels)
    config = QuantizationConfig.of(
        scheme,
        recipe,
        scale_with_width=scale_ranks,
        scopes=listed(scopes),
        seed=seed,
        **limits,
    )
    note = None if as_json else _show_estimate
    with progress_bar("Quantizing", quiet=as_json) as progress:
        result = run(model, samples, output, config, device=device, strict=strict, progress=progress, on_estimate=note)
    _print_summary(result) if as_json else _show_result(result)


def _print_summary(result: QuantizationResult) -> None:
    """One JSON object."""
    summary = dict(
        output=str(result.folder),
        scheme=str(result.config.scheme),
        recipe=result.config.recipe.name,
        bits_per_weight=result.bits_per_weight,
        samples=result.samples,
        tokens=result.tokens,
        seconds=result.seconds,
        resumed_blocks=result.resumed_blocks,
        estimated_bytes=result.estimated_bytes,
        peak_bytes=result.peak_bytes,
        events=[f"{event.where}: {event.what}" for event in result.events],
    )
    print(json.dumps(summary))


def _show_result(result: QuantizationResult) -> None:
    for event in result.events:
        errors.print(f"[yellow]Note:[/] {plain(f'{event.where}: {event.what}')}", highlight=False, soft_wrap=True)
    tokens = ", ".join(f"{count:,} {name}" for name, count in result.tokens.items())
    peak, estimated = (bytes_ / 2**20 for bytes_ in (result.peak_bytes, result.estimated_bytes))
    console.print(
        f"Wrote [bold]{plain(str(result.folder))}[/]: {result.config.scheme}, recipe {result.config.recipe.name}, "
        f"{result.bits_per_weight:.2f} stored bits per weight.\n"
        f"{result.samples} samples ({tokens} tokens), {result.seconds:.0f} s, "
        f"peak memory {peak:,.0f} MiB (estimated {estimated:,.0f} MiB)."
    )
    if result.bits_per_weight > FULL_BITS:
        errors.print(
            f"[yellow]Note:[/] that is more than the {FULL_BITS} bits of a weight in full precision: these layers are "
            "narrow for experts of such ranks. --scale-ranks makes them follow the width; a recipe with fewer experts "
            "(quant-experts), or with none (gptq), takes less.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _show_estimate(estimate: MemoryEstimate) -> None:
    mib = {k: v / 2**20 for k, v in vars(estimate).items()}
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in mib.items())
    text = f"Estimated peak memory: {estimate.total / 2**20:,.0f} MiB ({parts})."
    errors.print(text, highlight=False, soft_wrap=True)
