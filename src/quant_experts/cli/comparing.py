"""`demo` and `compare`: several methods, one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant_experts.cli.options import DeviceOption, JsonOption, ScaleOption, ScopesOption, SeedOption, listed
from quant_experts.cli.terminal import console, plain, progress_bar
from quant_experts.config import RECIPES

if TYPE_CHECKING:
    from quant_experts.evaluation.comparison import Comparison

SchemesOption = Annotated[str, typer.Option(help="Comma-separated schemes, as W4A6, W4A8, W4Afp8, W3A16.")]
MethodsOption = Annotated[str, typer.Option(help=f"Comma-separated recipes: {', '.join(RECIPES)}.")]
ControlsOption = Annotated[str, typer.Option(help="Comma-separated controls, or all (listed in docs/scoreboard.md).")]
FiguresOption = Annotated[Path | None, typer.Option(help="Write the report's figures to this folder too, as SVG.")]


def demo(
    output: Annotated[Path, typer.Option(help="Where checkpoints and report.html go.")] = Path("demo-output"),
    schemes: SchemesOption = "W4A6",
    recipes: Annotated[str, typer.Option(help="Comma-separated recipes.")] = "rtn,aser,paper,quant-experts",
    questions: Annotated[int, typer.Option(help="Score this many questions.")] = 210,
    split: Annotated[str, typer.Option(help="tuning, or test (2,000 questions, to be looked at last).")] = "tuning",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Quantize the bundled vision-language model, ask it questions before and after, and write a report. Needs no
    network."""
    from quant_experts.evaluation.demo import run_demo
    from quant_experts.report.html import load_renderer

    load_renderer()  # missing libraries are better noticed now than after minutes of work
    settings: dict[str, Any] = dict(schemes=listed(schemes), recipes=listed(recipes), seed=seed)
    settings |= dict(questions=questions, split=split, samples=samples)
    with progress_bar("Demo", quiet=as_json) as progress:
        comparison = run_demo(output, progress=progress, **settings)
    _show(comparison, output, as_json=as_json)


def compare(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of the model, or demo.")],
    methods: MethodsOption = "rtn,gptq,aser,paper,quant-experts",
    schemes: SchemesOption = "W4A6",
    samples: Annotated[str | None, typer.Option(help="Calibration samples, as for quantize; demo has its own.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSONL of questions, as for eval; demo has its own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score at most this many questions; demo: 280 unless told.")] = None,
    sample_limit: Annotated[int, typer.Option(help="Calibrate with at most this many samples.")] = 128,
    split: Annotated[str, typer.Option(help="Of demo's questions: tuning, or test, to be looked at last.")] = "tuning",
    controls: ControlsOption = "",
    control_of: Annotated[str | None, typer.Option(help="Controls of this method; the first with experts.")] = None,
    scale_ranks: ScaleOption = True,
    scopes: ScopesOption = "language",
    output: Annotated[Path, typer.Option(help="Where all goes; repeat the call to go on.")] = Path("compare-output"),
    figures: FiguresOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model by several methods and schemes and put them on one scoreboard: accuracy, bits, operations, time.

    Example: `quant-experts compare demo --schemes W4A6,W4A8 --controls all`
    """
    from quant_experts.evaluation.scoreboard import run_comparison
    from quant_experts.report.html import load_renderer

    load_renderer()  # missing libraries are better noticed now than after minutes of work
    rows: dict[str, Any] = dict(methods=listed(methods), schemes=listed(schemes), scopes=listed(scopes))
    rows |= dict(controls=listed(controls) if controls else [], control_of=control_of, scale_with_width=scale_ranks)
    task: dict[str, Any] = dict(samples=samples, sample_limit=sample_limit, questions=questions, question_limit=limit)
    task |= dict(split=split, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
    with progress_bar("Comparing", quiet=as_json) as progress:
        comparison = run_comparison(model, output, seed=seed, progress=progress, **rows, **task)
    _show(comparison, output, figures, as_json=as_json)


def _show(comparison: Comparison, output: Path, figures: Path | None = None, *, as_json: bool) -> None:
    """Write the report, and the figures if they are asked for; print tables, or one JSON object."""
    from quant_experts.report.html import write_report
    from quant_experts.report.text import comparison_json, comparison_tables

    report = write_report(comparison, output / "report.html")
    if figures is not None:
        from quant_experts.report.files import write_figures

        write_figures(comparison, figures)
    if as_json:
        print(json.dumps(comparison_json(comparison) | {"report": str(report)}))
        return
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(f"Report with figures: [bold]{plain(str(report))}[/]", soft_wrap=True)
