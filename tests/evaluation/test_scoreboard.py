"""Rows of the scoreboard: made once, read back, made again when something that decides them changed; and controls."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import SMALL, small_samples

from quant_experts import QuantExpertsError, QuantizationConfig, Recipe
from quant_experts.config import RECIPES, Scheme
from quant_experts.evaluation import bench, controls
from quant_experts.evaluation.bench import Bench, Contender, Outcome
from quant_experts.evaluation.comparison import FULL_PRECISION, Comparison
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.evaluation.scoreboard import compare, contenders, relative_error, table
from quant_experts.evaluation.task import Task, open_task

WIDTH = 64


def contender(recipe: Recipe = SMALL, scheme: str = "W4A6") -> Contender:
    config = QuantizationConfig.of(scheme, recipe, samples=4)
    return Contender(recipe.name, config, scheme)


@pytest.fixture(scope="module")
def task(tiny: Callable[..., Path]) -> Task:
    samples = small_samples("qwen2_vl", 6)
    items = [EvaluationItem(s.question, (s.answer,), s.images, kind) for s, kind in zip(samples, "aabbcc", strict=True)]
    return Task(tiny("qwen2_vl"), "tiny", samples[:4], items, "cpu", max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scoreboard")


@pytest.fixture(scope="module")
def made(task: Task, folder: Path) -> Comparison:
    rows = [contender(RECIPES["rtn"]), contender()]
    return compare(task, rows, folder, controls=["static-bytes", "text-only"])


@pytest.fixture(scope="module")
def parent(task: Task, folder: Path, made: Comparison) -> Outcome:
    return Bench(task, folder, 1, lambda *_: None).outcome(contender())


def test_every_row_has_every_measure(made: Comparison) -> None:
    labels = [f"{row.method} {row.scheme}".strip() for row in made.rows]
    assert labels[:3] == [FULL_PRECISION, "rtn W4A6", "paper W4A6"]
    assert labels[3:] == ["paper, static at equal bytes W4A6", "paper, text-only calibration W4A6"]
    full, rtn, paper = made.rows[:3]
    assert set(paper.accuracy) == {"average", "a", "b", "c"} and full.kl is None and full.layer_error is None
    assert rtn.layer_error == pytest.approx(1) and rtn.repair_flops == 0 and rtn.over_rtn == {}
    assert paper.kl and paper.kl.mean > 0 and paper.layer_error and paper.layer_error < 1
    assert paper.overfit and rtn.overfit and paper.overfit > rtn.overfit > 0.5
    assert paper.oracle_layer_error and paper.oracle_layer_error < paper.layer_error
    assert paper.base_flops == rtn.base_flops and paper.repair_flops and paper.bits_per_weight and paper.token_bytes
    assert set(paper.over_rtn) == {"accuracy", "nll", "kl"}
    best = [row.method for row in made.rows[1:] if "kl" not in row.behind_best]
    assert len(best) == 1 and all(row.behind_best["kl"].mean >= 0 for row in made.rows[1:] if row.method not in best)
    assert set(made.layers) == set(labels[1:4]) and len(made.answers) == 3


def test_finished_rows_are_read_back(made: Comparison, task: Task, folder: Path, monkeypatch: object) -> None:
    patch = pytest.MonkeyPatch()
    seen: list[tuple[int, int, str]] = []
    with patch.context() as here:
        here.setattr(bench, "quantize", None)
        here.setattr(bench, "generate_answers", None)
        rows = [contender(RECIPES["rtn"]), contender()]
        again = compare(
            task, rows, folder, controls=["static-bytes", "text-only"], progress=lambda *step: seen.append(step)
        )
    assert again.rows == made.rows and again.layers == made.layers
    assert [done for done, _, _ in seen] == [20, 40, 60, 80, 100] and {total for _, total, _ in seen} == {100}


def test_other_questions_score_again_and_another_configuration_quantizes_again(task: Task, tmp_path: Path) -> None:
    calls: list[str] = []
    real = bench.quantize
    patch = pytest.MonkeyPatch()
    with patch.context() as here:
        here.setattr(bench, "quantize", lambda *a, **k: calls.append(a[3].recipe.name) or real(*a, **k))  # type: ignore[func-returns-value]
        rtn = contender(RECIPES["rtn"])
        first = compare(task, [rtn], tmp_path)
        fewer = replace(task, items=task.items[:4])
        second = compare(fewer, [rtn], tmp_path)
        assert (
            calls == ["rtn"]
            and second.questions == 4
            and second.rows[1].bits_per_weight == first.rows[1].bits_per_weight
        )
        changed = replace(rtn, config=rtn.config.model_copy(update=dict(seed=1)))
        compare(fewer, [changed], tmp_path)
        assert calls == ["rtn", "rtn"]
        (tmp_path / "rtn-W4A6.json").write_text("{")  # a damaged row: its checkpoint is no longer known to be ours
        with pytest.raises(QuantExpertsError, match="not empty"):
            compare(fewer, [changed], tmp_path)


def test_equal_bytes_means_just_below(parent: Outcome) -> None:
    bits = sum(record.stored_bits for record in parent.records)
    for name in ("static-bytes", "small-groups", "more-bits"):
        control = controls.derive(name, contender(), parent, WIDTH)
        assert control is not None and control.scheme == "W4A6", name
    static = controls.derive("static-bytes", contender(), parent, WIDTH)
    assert static and static.config.recipe.routed_rank == 0 and static.config.recipe.shared_rank > 4 + 4
    assert sum(r.stored_bits for r in parent.records) == bits
    groups = controls.derive("small-groups", contender(), parent, WIDTH)
    assert groups and groups.config.recipe.name == "rtn" and groups.config.scheme.group_size
    size = groups.config.scheme.group_size
    stored = [
        controls._plain_bits(groups.config.scheme.model_copy(update=dict(group_size=g)), parent)
        for g in (size, size - 1)
    ]
    assert stored[0] <= bits < stored[1]


def test_more_weight_bits_than_the_activations_allow_are_no_control(parent: Outcome) -> None:
    fp8 = contender(scheme="W4Afp8")
    assert controls.derive("more-bits", fp8, parent, WIDTH) is None
    groups = controls.derive("small-groups", fp8, parent, WIDTH)
    assert groups and groups.config.scheme == Scheme.parse(str(groups.config.scheme))


def test_controls_change_one_thing(parent: Outcome) -> None:
    found = {name: controls.derive(name, contender(), parent, WIDTH) for name in controls.CONTROLS}
    recipes = {name: row.config.recipe for name, row in found.items() if row}
    assert recipes["random-router"] == SMALL.model_copy(update=dict(router="random"))
    assert recipes["random-clusters"] == SMALL.model_copy(update=dict(routed="random"))
    assert recipes["static-rank"] == SMALL.model_copy(update=dict(shared_rank=8, routed_rank=0))
    text = found["text-only"]
    assert text and text.text_only and text.config == contender().config


def test_controls_that_cannot_be_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(QuantExpertsError, match="Unknown control 'magic'"):
        compare(task, [contender()], tmp_path, controls=["magic"])
    with pytest.raises(QuantExpertsError, match="'aser' has nothing that the control 'random-router'"):
        compare(task, [contender(RECIPES["aser"])], tmp_path, controls=["random-router"])
    with pytest.raises(QuantExpertsError, match="method with experts"):
        compare(task, [contender(RECIPES["rtn"])], tmp_path, controls=["all"])
    assert not controls.applicable("random-router", RECIPES["aser"]) and controls.applicable("text-only", SMALL)


def test_names_are_checked_before_the_work() -> None:
    with pytest.raises(QuantExpertsError, match="magic"):
        contenders(["magic"], ["W4A6"], scale_with_width=True, seed=0, samples=4)
    with pytest.raises(QuantExpertsError, match="--samples"):
        open_task("some-model")
    with pytest.raises(QuantExpertsError, match="Unknown split"):
        open_task("demo", split="secret")
    rows = contenders(["rtn", "rtn"], ["w4a6", "W4A8"], scale_with_width=True, seed=0, samples=4)
    assert [row.label for row in rows] == ["rtn W4A6", "rtn W4A8"]


def test_a_difference_is_paired_by_question() -> None:
    """Two questions apart on every question's score: a small gain on noisy questions is still seen."""
    items = [EvaluationItem(f"q{i}", (str(i % 2),)) for i in range(40)]
    noise = [float(i % 7) for i in range(40)]

    def outcome(method: str, shift: float, wrong: int) -> Outcome:
        answers = [str(i % 2) if i >= wrong else "x" for i in range(40)]
        points = [float(i >= wrong) for i in range(40)]
        nll = [value + shift for value in noise]
        return Outcome(method, "W4A6", answers, points, nll, nll, 1.0, facts={"bits_per_weight": 4.0})

    rows = table(items, [outcome("rtn", 0.02, 5), outcome("better", 0.0, 5), outcome("most", 0.5, 4)])
    gain = rows[1].over_rtn
    assert gain["nll"].low > 0 and gain["nll"].mean == pytest.approx(0.02) and gain["accuracy"].mean == 0
    assert rows[0].behind_best["kl"].mean == pytest.approx(0.02) and "kl" not in rows[1].behind_best
    assert rows[0].behind_best["accuracy"].low <= 0 and "accuracy" not in rows[2].behind_best


def test_layer_errors_count_each_linear(parent: Outcome) -> None:
    first = replace(parent.records[0], error={"all": 0.1}, linears=("a", "b", "c"))
    second = replace(parent.records[0], error={"all": 0.001}, linears=("d",))
    nothing = replace(second, error={"all": 0.0}, linears=("e",))
    plain = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.1, "e": 1.0}
    assert relative_error([first, second, nothing], plain) == pytest.approx((0.1**3 * 0.01) ** (1 / 4))
    assert relative_error([nothing], plain) is None


def test_a_control_at_another_scheme_is_measured_against_the_listed_one(
    made: Comparison, task: Task, folder: Path
) -> None:
    found = compare(
        task, [contender(RECIPES["rtn"]), contender()], folder, controls=["more-bits", "text-only", "random-router"]
    )
    wider, text, random = found.rows[3:]
    assert random.layer_error and random.oracle_layer_error and random.oracle_layer_error < random.layer_error
    assert random.bits_per_weight == found.rows[2].bits_per_weight and random.layer_error != found.rows[2].layer_error
    assert "8-bit weights" in wider.method and wider.layer_error and wider.layer_error < 0.5
    assert text.layer_error is None and text.token_bytes and "text-only" not in "".join(found.layers)
    assert "8-bit" not in "".join(found.answers[0].answers)
