"""Which methods make the front."""

from quant_experts.evaluation.comparison import Score
from quant_experts.report.fronts import front


def test_the_front_holds_what_nothing_beats() -> None:
    costs = {"a": (4.0, 0.5), "b": (4.0, 0.6), "c": (5.0, 0.5), "d": (5.0, 0.2), "e": (9.0, 0.3), "f": (9.5, 0.1)}
    points = {name: (cost, Score(error, error, error)) for name, (cost, error) in costs.items()}
    assert front(points) == ["a", "d", "f"]
    assert front(dict(list(points.items())[:1])) == ["a"]
