"""The scoreboard: every recipe and control at every scheme, on one model with one set of questions."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quant_experts.artifacts import GroupRecord
from quant_experts.config import DEFAULT_SCOPES, QuantizationConfig, Recipe
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation import controls as control_rows
from quant_experts.evaluation.bench import Bench, Contender, Outcome, Progress
from quant_experts.evaluation.bootstrap import difference_interval
from quant_experts.evaluation.comparison import AnswerExample, Comparison, MethodRow, Score
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.evaluation.scores import score_answers
from quant_experts.evaluation.task import Task, library_versions, open_task

EXAMPLES = 3
PLAIN_ROUNDING = "rtn"

_MEASURES: dict[str, Callable[[Outcome], list[float] | None]] = {
    # Turned so that more is better.
    "accuracy": lambda outcome: outcome.points,
    "nll": lambda outcome: [-value for value in outcome.nll],
    "kl": lambda outcome: None if outcome.kl is None else [-value for value in outcome.kl],
}


def run_comparison(
    model: str,
    output: Path,
    *,
    methods: Sequence[str],
    schemes: Sequence[str],
    controls: Sequence[str],
    control_of: str | None,
    scale_with_width: bool,
    scopes: Sequence[str],
    seed: int,
    progress: Progress,
    **given: Any,
) -> Comparison:
    """What the command `compare` does; given: the arguments of `open_task`. Raises `QuantExpertsError` as `compare`
    and `open_task` do."""
    samples = given["sample_limit"]
    rows = contenders(methods, schemes, scale_with_width=scale_with_width, seed=seed, samples=samples, scopes=scopes)
    options = dict(methods=",".join(methods), schemes=",".join(schemes), controls=",".join(controls), seed=seed)
    options |= {"control-of": control_of} | {name.replace("_", "-"): value for name, value in given.items()}
    options |= {} if tuple(scopes) == DEFAULT_SCOPES else {"scopes": ",".join(scopes)}
    flags = [] if scale_with_width else ["--no-scale-ranks"]
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value not in (None, "")]
    return compare(
        open_task(model, **given),
        rows,
        output,
        controls=controls,
        control_of=control_of,
        title=f"{len(rows)} rows on one scoreboard" if len(rows) > 1 else "One method against full precision",
        command=" ".join(["quant-experts compare", shlex.quote(model), *words, *flags]).replace(
            "question-limit", "limit"
        ),
        progress=progress,
    )


def contenders(
    methods: Sequence[str | Recipe],
    schemes: Sequence[str],
    *,
    scale_with_width: bool,
    seed: int,
    samples: int,
    scopes: Sequence[str] = DEFAULT_SCOPES,
) -> list[Contender]:
    """Every method at every scheme, scheme by scheme. Raises `QuantExpertsError` for a name that does not exist."""
    configs = [
        QuantizationConfig.of(
            scheme, method, scale_with_width=scale_with_width, scopes=scopes, seed=seed, samples=samples
        )
        for scheme in dict.fromkeys(schemes)
        for method in dict.fromkeys(methods)
    ]
    return [Contender(config.recipe.name, config, str(config.scheme)) for config in configs]


def compare(
    task: Task,
    rows: Sequence[Contender],
    output: Path,
    *,
    controls: Sequence[str] = (),
    control_of: str | None = None,
    title: str = "Methods on one scoreboard",
    command: str = "",
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Make every row, and the named controls of one method at each scheme, in `output`.

    A row that an earlier call with the same settings finished is read back.

    Args:
        controls: names of `CONTROLS`, or `all` for those that the parent admits.
        control_of: the method that controls are derived from; by default the first with routed experts, else the first
            with any expert.

    Raises:
        QuantExpertsError: for unknown names, or what quantizing and scoring refuse.
    """
    parent, names = _choose_controls(rows, controls, control_of)
    parents = [row for row in rows if row.method == parent]
    bench = Bench(task, output, 1 + len(rows) + len(names) * len(parents), progress)
    outcomes = [bench.full_precision()]
    for row in rows:
        outcomes.append(bench.outcome(row))
        if row in parents:
            made = (control_rows.derive(name, row, outcomes[-1], task.width) for name in names)
            outcomes += [bench.outcome(control) for control in made if control is not None]
    return Comparison(
        title=title,
        model=task.name,
        command=command,
        questions=len(task.items),
        rows=tuple(table(task.items, outcomes)),
        layers={outcome.label: outcome.records for outcome in outcomes if _same_tokens(outcome)},
        answers=_examples(task.items, {o.label: o.answers for o in outcomes if o.contender in (None, *rows)}),
        events={"calibration": task.events} | {outcome.label: outcome.events for outcome in outcomes if outcome.facts},
        versions=_versions(),
    )


def _choose_controls(
    rows: Sequence[Contender], names: Sequence[str], control_of: str | None
) -> tuple[str | None, list[str]]:
    """The method whose controls are made, and which of them. Raises `QuantExpertsError` for what cannot be."""
    recipes = {row.method: row.config.recipe for row in rows}
    if not names:
        return None, []
    if control_of is None:
        routed = [name for name, recipe in recipes.items() if recipe.routed_rank]
        static = [name for name, recipe in recipes.items() if recipe.shared_rank]
        control_of = next(iter(routed + static), None)
    if control_of not in recipes:
        raise QuantExpertsError("Controls need a compared method with experts: add one, or name it with --control-of.")
    recipe = recipes[control_of]
    if control_rows.ALL in names:
        return control_of, [name for name in control_rows.CONTROLS if control_rows.applicable(name, recipe)]
    for name in names:
        if not control_rows.applicable(name, recipe):
            raise QuantExpertsError(f"'{control_of}' has nothing that the control '{name}' takes away: leave it out.")
    return control_of, list(names)


def table(items: Sequence[EvaluationItem], outcomes: Sequence[Outcome]) -> list[MethodRow]:
    """Rows with intervals, and with differences paired by question, in the order of the outcomes."""
    rows = []
    for outcome in outcomes:
        scores = score_answers(items, outcome.answers, nll=outcome.nll, kl=outcome.kl)
        assert scores.average.nll is not None
        peers = [other for other in outcomes if other.facts and other.scheme == outcome.scheme]
        rows.append(
            MethodRow(
                method=outcome.method,
                scheme=outcome.scheme,
                accuracy={"average": scores.average.score, **{kind: row.score for kind, row in scores.kinds.items()}},
                nll=scores.average.nll,
                kl=scores.average.kl,
                evaluate_seconds=outcome.evaluate_seconds,
                over_rtn=_over_rtn(outcome, peers),
                behind_best=_behind_best(outcome, peers),
                **outcome.facts,
                **_layer_facts(outcome, peers),
            )
        )
    return rows


def _over_rtn(outcome: Outcome, peers: Sequence[Outcome]) -> dict[str, Score]:
    plain = next((peer for peer in peers if peer.method == PLAIN_ROUNDING), None)
    return _differences(outcome, plain) if outcome in peers and plain and plain is not outcome else {}


def _behind_best(outcome: Outcome, peers: Sequence[Outcome]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for name, measure in _MEASURES.items() if outcome in peers else ():
        best = max(peers, key=lambda peer: sum(measure(peer) or ()))
        if best is not outcome:
            found[name] = _differences(best, outcome)[name]
    return found


def _differences(first: Outcome, second: Outcome) -> dict[str, Score]:
    """By how much `first` is better, by measure."""
    pairs = {name: (measure(first), measure(second)) for name, measure in _MEASURES.items()}
    return {name: difference_interval(a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}


def _layer_facts(outcome: Outcome, peers: Sequence[Outcome]) -> dict[str, Any]:
    """What a row says of all its layers together; empty for full precision."""
    records = outcome.records
    if not records:
        return {}
    facts = dict(
        base_flops=sum(record.base_flops for record in records) or None,
        repair_flops=sum(record.repair_flops for record in records) if records[0].base_flops else None,
        token_bytes=sum(record.token_bytes for record in records) or None,
    )
    if not _same_tokens(outcome):
        return facts
    plain = _plain_errors(outcome, peers)
    return facts | dict(
        layer_error=relative_error(records, plain),
        overfit=overfit(records),
        oracle_layer_error=relative_error(records, plain, oracle=True)
        if any(r.oracle_error for r in records)
        else None,
    )


def _same_tokens(outcome: Outcome) -> bool:
    """Whether layer errors were measured on the tokens of all rows: those of samples without images are others."""
    return bool(outcome.records) and not (outcome.contender and outcome.contender.text_only)


def _plain_errors(outcome: Outcome, peers: Sequence[Outcome]) -> dict[str, float]:
    """Plain rounding's error at the listed scheme, by linear. A control that is stored at another scheme recorded that
    scheme's, so it takes a peer's."""

    def at_listed_scheme(each: Outcome) -> bool:
        return each.contender is None or str(each.contender.config.scheme) == each.scheme

    source = next((each for each in (outcome, *peers) if at_listed_scheme(each) and _same_tokens(each)), outcome)
    return {linear: record.rtn_error.get("all", 0.0) for record in source.records for linear in record.linears}


def relative_error(records: Sequence[GroupRecord], plain: Mapping[str, float], *, oracle: bool = False) -> float | None:
    """Geometric mean over linears of the error over plain rounding's; None where no error is a positive number.

    A group counts once for each of its linears, so that methods which group linears differently are weighted alike.
    """
    logs = []
    for record in records:
        error = (record.oracle_error or record.error if oracle else record.error).get("all", 0.0)
        for linear in record.linears:
            if 0 < error < math.inf and 0 < plain.get(linear, 0.0) < math.inf:
                logs.append(math.log(error / plain[linear]))
    return math.exp(sum(logs) / len(logs)) if logs else None


def overfit(records: Sequence[GroupRecord]) -> float | None:
    """Geometric mean over linears of the error on held-out tokens over that on calibration tokens: 1 where nothing was
    learned by heart. None where no error is a positive number."""
    logs = []
    for record in records:
        held_out, fitted = record.error.get("all", 0.0), record.calibration_error or 0.0
        if 0 < held_out < math.inf and 0 < fitted < math.inf:
            logs += [math.log(held_out / fitted)] * len(record.linears)
    return math.exp(sum(logs) / len(logs)) if logs else None


def _examples(items: Sequence[EvaluationItem], answers: dict[str, list[str]]) -> tuple[AnswerExample, ...]:
    """One image question of each of the first kinds, preferring those on which the methods disagree."""
    examples: list[AnswerExample] = []
    kinds: set[str] = set()
    pictured = [i for i, item in enumerate(items) if item.images]
    pictured.sort(key=lambda i: len({given[i] for given in answers.values()}) == 1)  # stable: disagreement first
    several = len({items[i].kind for i in pictured}) >= EXAMPLES
    for i in pictured:
        item = items[i]
        if len(examples) < EXAMPLES and not (several and item.kind in kinds):
            given = {label: all_answers[i] for label, all_answers in answers.items()}
            examples.append(AnswerExample(item.question, item.answers[0], item.images[0], given))
            kinds.add(item.kind)
    return tuple(examples)


def _versions() -> dict[str, str]:
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return library_versions() | {"python": platform.python_version(), "machine": machine}
