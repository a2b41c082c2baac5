"""The table's numbers against sums by hand."""

import json

import pytest

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.evaluation.scores import score_answers

ITEMS = [
    EvaluationItem("a?", ("a",), kind="letters"),
    EvaluationItem("b?", ("b",), kind="letters"),
    EvaluationItem("100?", ("100",), kind="numbers", scorer="relaxed_accuracy"),
]


def test_rows_and_average() -> None:
    scores = score_answers(ITEMS, ["a", "x", "104"], nll=[1.0, 2.0, 6.0], kl=[0.0, 0.5, 0.25])
    assert list(scores.kinds) == ["letters", "numbers"] and scores.per_question == [1, 0, 1]
    letters = scores.kinds["letters"]
    assert letters.count == 2 and letters.score.mean == 0.5 and letters.score.low <= 0.5 <= letters.score.high
    assert letters.nll is not None and letters.nll.mean == 1.5 and letters.kl is not None and letters.kl.mean == 0.25
    assert scores.average.count == 3 and scores.average.score.mean == pytest.approx(2 / 3)
    assert scores.average.nll is not None and scores.average.nll.mean == 3
    plain = json.loads(json.dumps(scores.to_json()))
    assert plain["kinds"]["numbers"]["score"] == dict(mean=1, low=1, high=1) and plain["kl_per_question"] == [
        0,
        0.5,
        0.25,
    ]


def test_measures_left_out_are_null() -> None:
    scores = score_answers(ITEMS, ["a", "b", "1"])
    assert scores.average.nll is None and scores.to_json()["kinds"]["letters"]["kl"] is None


def test_bad_input() -> None:
    with pytest.raises(QuantExpertsError, match="no questions"):
        score_answers([], [])
    with pytest.raises(ValueError, match="argument"):
        score_answers(ITEMS, ["a"])
    with pytest.raises(ValueError, match="3 questions"):
        score_answers(ITEMS, ["a", "b", "c"], nll=[1.0])
