"""Which experts serve which tokens, as sums of records."""

from __future__ import annotations

import math

import pytest

from quant_experts.artifacts import GroupRecord
from quant_experts.report.experts import expert_use, experts, place_use


def record(*linears: str, **more: object) -> GroupRecord:
    return GroupRecord(linears, 10, (4, 4), 64, 16, **more)  # type: ignore[arg-type]


USE = {"all": [0.3, 0.4, 0.3], "image": [0.1, 0.2, 0.7], "text": [0.5, 0.5, 0.0]}


def test_experts_are_sorted_by_their_preference_for_images() -> None:
    found = expert_use([record("layers.4.q", expert_use=USE), record("layers.4.o")])
    assert found is not None
    assert found.shares == {"text": [[0.0, 0.5, 0.5]], "image": [[0.7, 0.2, 0.1]]}
    assert found.blocks == ("4",)
    assert found.common == pytest.approx(0.3)


def test_experts_without_image_tokens_or_at_all() -> None:
    found = expert_use([record("layers.0.q", expert_use={"all": [0.2, 0.8]})])
    assert found is not None and found.shares == {"all": [[0.8, 0.2]]} and found.common is None
    assert expert_use([record("layers.0.q")]) is None and experts({"rtn W4A6": [record("layers.0.q")]}) == []


def test_a_kind_that_one_group_never_saw_is_empty_there() -> None:
    found = expert_use([record("layers.0.q", expert_use=USE), record("layers.0.o", expert_use={"text": [0.2, 0.8, 0]})])
    assert found is not None and found.shares["text"][1] == [0.8, 0.2, 0] and len(found.shares["image"][1]) == 3
    assert all(map(math.isnan, found.shares["image"][1]))


def test_places_are_shares_of_a_part_of_the_sequence_in_the_middle_group() -> None:
    counts = {"text": [[3, 0], [1, 0], [0, 0]], "image": [[0, 1], [0, 2], [0, 5]]}
    middle = record("model.layers.4.q", expert_use=USE, expert_positions=counts)
    around = record("model.layers.0.q", expert_use=USE, expert_positions={"text": [[1], [0], [0]]})
    where, shares = place_use([around, middle, around])
    assert (
        where == "layers.4: q" and shares["image"][1] == [0.625, 0.25, 0.125] and shares["text"][0] == [0, 0.25, 0.75]
    )
    assert all(map(math.isnan, shares["text"][1] + shares["image"][0]))
    assert place_use([record("layers.0.q", expert_use=USE)]) == ("", {})
