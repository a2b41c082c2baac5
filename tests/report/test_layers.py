"""Sums of the errors of layers."""

from __future__ import annotations

import math

import pytest
from report import made_up

from quant_experts.artifacts import GroupRecord
from quant_experts.report.layers import (
    early_middle_late,
    errors_by,
    geometric_mean,
    group_name,
    overall_error,
    place,
)


def record(*linears: str, error: float, **more: object) -> GroupRecord:
    return GroupRecord(linears, 10, (4, 4), 64, 16, error={"all": error}, rtn_error={"all": 2 * error}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", "model.layers.12", "q_proj"),
        ("model.layers.3.mlp.experts.7.down_proj", "model.layers.3", "down_proj"),
        ("visual.merger.mlp.0", "visual.merger.mlp.0", "mlp.0"),
        ("lm_head", "lm_head", "lm_head"),
    ],
)
def test_place(name: str, block: str, kind: str) -> None:
    assert (place(name).block, place(name).kind) == (block, kind)


def test_geometric_mean_takes_what_has_a_logarithm() -> None:
    assert geometric_mean([1.0, 4.0, 0.0, -1.0, math.nan, math.inf, None]) == pytest.approx(2.0)
    assert geometric_mean([0.0]) is None


def test_a_group_counts_once_for_each_of_its_linears() -> None:
    records = [record("layers.0.q", "layers.0.k", error=0.1), record("layers.0.o", error=0.8)]
    assert errors_by(records, "block") == {"layers.0": pytest.approx(0.2)}
    assert errors_by(records, "kind") == {"q": pytest.approx(0.1), "k": pytest.approx(0.1), "o": pytest.approx(0.8)}
    assert overall_error(records, plain=True) == pytest.approx(0.4)


def test_chosen_depths_are_of_one_type() -> None:
    chosen = early_middle_late(made_up.records(1.0, 9))
    assert [group_name(r) for r in chosen.values()] == [f"layers.{i}: q_proj, k_proj, v_proj" for i in (0, 4, 8)]
    assert list(early_middle_late(made_up.records(1.0, 1))) == ["Only layer"]
    assert list(early_middle_late(made_up.records(1.0, 2))) == ["Early layer", "Late layer"]
    assert early_middle_late([record("a", error=1)]) == {}
