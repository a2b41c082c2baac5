"""The `quant-experts` command: parse, call, show. No logic lives here.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted, anything else a bug of ours (with its
traceback).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quant_experts import __version__
from quant_experts.config import MAX_PIXELS, RECIPES, SCOPES
from quant_experts.errors import QuantExpertsError, printable

if TYPE_CHECKING:
    from quant_experts.calibration.memory import MemoryEstimate
    from quant_experts.evaluation.comparison import Comparison

app = typer.Typer(
    name="quant-experts",
    help="Shrink vision-language models: quantized weights, and low-rank experts that repair the error.\n\n"
    "Start with `quant-experts demo`, which needs no network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
console = Console()
errors = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="Folder or Hugging Face name of the model.")]
SchemeOption = Annotated[
    str, typer.Option(help="Weight and activation bits: W4A6, W4A8, W3A16, W4A16g64-sym ... (A16: weights only).")
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


def main() -> None:
    """Entry point: bad input becomes one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except QuantExpertsError as error:
        errors.print(f"[bold red]Error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this exit
            errors.print("Interrupted; the same call goes on where this one stopped.", soft_wrap=True)
        raise


def _plain(text: str) -> str:
    """Text that rich prints as it is, without control characters."""
    from rich.markup import escape

    return escape(printable(text))


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
    pass


@contextlib.contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with time left, on stderr, as a function of (done, all, what)."""
    _silence_transformers()
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
            task, completed=done, total=total, description=_plain(f"{title} {what}".strip())
        )


def _silence_transformers() -> None:
    """Our own progress bar is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command()
def quantize(
    model: ModelArgument,
    samples: Annotated[
        str,
        typer.Argument(
            help="Calibration samples: a JSON or JSONL file (ShareGPT4V form, chat messages, or "
            "image/question/answer), a folder "
            "of images with captions, or the name of a Hugging Face data set."
        ),
    ],
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

    config = QuantizationConfig.of(
        scheme,
        recipe,
        scale_with_width=scale_ranks,
        scopes=scopes.split(","),
        seed=seed,
        samples=limit,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
    )
    with _bar("Quantizing", quiet=as_json) as progress:
        result = run(
            model,
            samples,
            output,
            config,
            device=device,
            strict=strict,
            progress=progress,
            on_estimate=None if as_json else _show_estimate,
        )
    summary = dict(
        output=str(result.folder),
        scheme=str(config.scheme),
        recipe=config.recipe.name,
        bits_per_weight=result.bits_per_weight,
        samples=result.samples,
        tokens=result.tokens,
        seconds=result.seconds,
        resumed_blocks=result.resumed_blocks,
        estimated_bytes=result.estimated_bytes,
        peak_bytes=result.peak_bytes,
        events=[f"{event.where}: {event.what}" for event in result.events],
    )
    if as_json:
        print(json.dumps(summary))
        return
    for event in result.events:
        errors.print(f"[yellow]Note:[/] {_plain(f'{event.where}: {event.what}')}", highlight=False, soft_wrap=True)
    tokens = ", ".join(f"{count:,} {name}" for name, count in result.tokens.items())
    peak, estimated = (bytes_ / 2**20 for bytes_ in (result.peak_bytes, result.estimated_bytes))
    console.print(
        f"Wrote [bold]{_plain(str(result.folder))}[/]: {config.scheme}, recipe {config.recipe.name}, "
        f"{result.bits_per_weight:.2f} stored bits per weight.\n"
        f"{result.samples} samples ({tokens} tokens), {result.seconds:.0f} s, "
        f"peak memory {peak:,.0f} MiB (estimated {estimated:,.0f} MiB)."
    )


def _show_estimate(estimate: MemoryEstimate) -> None:
    mib = {k: v / 2**20 for k, v in vars(estimate).items()}
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in mib.items())
    text = f"Estimated peak memory: {estimate.total / 2**20:,.0f} MiB ({parts})."
    errors.print(text, highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where checkpoints and report.html go.")] = Path("demo-output"),
    schemes: Annotated[str, typer.Option(help="Comma-separated schemes.")] = "W4A6",
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
    from quant_experts.report.html import load_renderer, write_report

    load_renderer()  # missing libraries are better noticed now than after minutes of work
    with _bar("Demo", quiet=as_json) as progress:
        comparison = run_demo(
            output,
            schemes=schemes.split(","),
            recipes=recipes.split(","),
            questions=questions,
            split=split,
            samples=samples,
            seed=seed,
            progress=progress,
        )
    _show_comparison(comparison, write_report(comparison, output / "report.html"), as_json=as_json)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of the model, or demo.")],
    methods: Annotated[str, typer.Option(help=f"Comma-separated recipes: {', '.join(RECIPES)}.")] = (
        "rtn,gptq,aser,paper,quant-experts"
    ),
    schemes: Annotated[str, typer.Option(help="Comma-separated schemes.")] = "W4A6",
    samples: Annotated[str | None, typer.Option(help="Calibration samples, as for quantize; demo has its own.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSONL of questions, as for eval; demo has its own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score at most this many questions; demo: 280 unless told.")] = None,
    sample_limit: Annotated[int, typer.Option(help="Calibrate with at most this many samples.")] = 128,
    split: Annotated[str, typer.Option(help="Of demo's questions: tuning, or test, to be looked at last.")] = "tuning",
    controls: Annotated[
        str, typer.Option(help="Comma-separated controls, or all (listed in docs/scoreboard.md).")
    ] = "",
    control_of: Annotated[str | None, typer.Option(help="Controls of this method; the first with experts.")] = None,
    scale_ranks: ScaleOption = True,
    scopes: ScopesOption = "language",
    output: Annotated[Path, typer.Option(help="Where all goes; repeat the call to go on.")] = Path("compare-output"),
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
    from quant_experts.report.html import load_renderer, write_report

    load_renderer()  # missing libraries are better noticed now than after minutes of work
    with _bar("Comparing", quiet=as_json) as progress:
        comparison = run_comparison(
            model,
            output,
            methods=methods.split(","),
            schemes=schemes.split(","),
            controls=controls.split(",") if controls else [],
            control_of=control_of,
            scale_with_width=scale_ranks,
            scopes=scopes.split(","),
            seed=seed,
            progress=progress,
            samples=samples,
            questions=questions,
            sample_limit=sample_limit,
            question_limit=limit,
            split=split,
            device=device,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    _show_comparison(comparison, write_report(comparison, output / "report.html"), as_json=as_json)


def _show_comparison(comparison: Comparison, report: Path, *, as_json: bool) -> None:
    """Tables, or one JSON object."""
    from quant_experts.report.text import comparison_json, comparison_tables

    if as_json:
        print(json.dumps(comparison_json(comparison) | {"report": str(report)}))
        return
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(f"Report with figures: [bold]{_plain(str(report))}[/]", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    questions: Annotated[
        Path, typer.Argument(help='JSONL, one question a line: {"image": ..., "question": ..., "answer": ...}.')
    ],
    scorer: Annotated[
        str, typer.Option(help="exact_match, anls (documents) or relaxed_accuracy (charts); a line may name its own.")
    ] = "exact_match",
    limit: Annotated[int | None, typer.Option(help="Score at most this many questions.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 32,
    device: DeviceOption = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write each answer with its score to this JSONL file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model, quantized or not, on image questions: mean and 95% interval by kind of question."""
    from quant_experts.evaluation.scoring import score_file

    with _bar("Answering", quiet=as_json) as progress:
        result = score_file(
            model,
            questions,
            scorer=scorer,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device,
            predictions=predictions,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result))
        return
    table = Table("kind", "questions", scorer, "95% interval")
    for kind, row in result["scores"].items():
        table.add_row(_plain(kind), str(row["count"]), f"{row['mean']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}")
    console.print(table)


@app.command()
def ask(
    model: ModelArgument,
    question: Annotated[str, typer.Argument(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model, quantized or not, one question about images (or none). `demo` as the model asks the bundled one."""
    from quant_experts.evaluation.scoring import ask_model

    _silence_transformers()
    answer = ask_model(
        _model_or_demo(model),
        question,
        image or [],
        max_new_tokens=max_new_tokens,
        device=device,
    )
    print(json.dumps({"answer": answer})) if as_json else console.print(_plain(answer), highlight=False)


def _model_or_demo(model: str) -> str | Path:
    """The bundled model under the name `demo`, unless there is a folder of that name."""
    if model == "demo" and not Path(model).exists():
        from quant_experts.demo import model_path

        return model_path()
    return model


@app.command()
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
        f"[bold]{_plain(str(model))}[/]: {result['scheme']}, recipe {result['recipe']}, format "
        f"{result['format_version']}, "
        f"{len(result['groups'])} groups, {result['bits_per_weight']:.2f} stored bits per weight, "
        f"{result['bytes'] / 2**20:,.1f} MiB in all."
    )
    table = Table("group", "N x K", "shared", "routed", "bits", "error", "RTN error")
    for group in result["groups"]:
        names = _plain(group["linears"][0]) + (f" +{len(group['linears']) - 1}" if len(group["linears"]) > 1 else "")
        routed = f"{group['experts']} x {group['routed_rank']}" if group["experts"] else "-"
        figures = [f"{group[key]:.2e}" if group.get(key) is not None else "-" for key in ("error", "rtn_error")]
        shape = f"{group['shape'][0]} x {group['shape'][1]}"
        table.add_row(names, shape, str(group["shared_rank"] or "-"), routed, f"{group['bits']:.2f}", *figures)
    console.print(table)


if __name__ == "__main__":
    main()
