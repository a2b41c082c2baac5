"""`eval` and `ask`: one model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from quant_experts.cli.options import DeviceOption, JsonOption, ModelArgument
from quant_experts.cli.terminal import console, plain, progress_bar, silence_transformers


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

    with progress_bar("Answering", quiet=as_json) as progress:
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
        table.add_row(plain(kind), str(row["count"]), f"{row['mean']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}")
    console.print(table)


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

    silence_transformers()
    answer = ask_model(
        _model_or_demo(model),
        question,
        image or [],
        max_new_tokens=max_new_tokens,
        device=device,
    )
    print(json.dumps({"answer": answer})) if as_json else console.print(plain(answer), highlight=False)


def _model_or_demo(model: str) -> str | Path:
    """The bundled model under the name `demo`, unless there is a folder of that name."""
    if model == "demo" and not Path(model).exists():
        from quant_experts.demo import model_path

        return model_path()
    return model
