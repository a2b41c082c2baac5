"""How the Hopper linear shares out its work: the functions that the compiler takes, run by Python on plain numbers."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, SimpleNamespace]]:
    """`hopper_work` with Python's arithmetic, and a grid to set: a program and how many there are."""
    from quant_experts.kernels.gpu import hopper_work

    grid = SimpleNamespace(program=0, programs=1)
    plain = SimpleNamespace(
        program_id=lambda axis: grid.program,
        num_programs=lambda axis: grid.programs,
        where=lambda condition, yes, no: yes if condition else no,
        minimum=min,
        maximum=max,
        cdiv=lambda a, b: -(-a // b),
    )
    monkeypatch.setattr(hopper_work, "gl", plain)
    for name in ("first_step", "holder", "share", "segment"):
        monkeypatch.setattr(hopper_work, name, getattr(hopper_work, name).fn)
    yield hopper_work, grid


@pytest.mark.parametrize("workers", [0, 1, 7, 36, 131, 132, 300])
@pytest.mark.parametrize("cost", [0, 1, 6, 40])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    ("steps", "tiles"), [(1, 1), (28, 28), (28, 131), (28, 132), (28, 133), (7, 296), (148, 28), (2, 3), (3, 264)]
)
def test_each_step_of_each_tile_has_one_holder(
    work: tuple[Any, SimpleNamespace], steps: int, tiles: int, shares: bool, cost: int, workers: int
) -> None:
    """Of one or two waves of tiles steps are shared, all alike, what programs do for experts first included; other
    tiles are whole. Shares of a tile belong to programs one after another, whose number `holder` tells."""
    hopper_work, grid = work
    grid.programs = min(132, tiles * steps if shares else tiles + workers)
    if workers >= grid.programs:
        cost = 0  # as `hopper_launch.work` has it
    held: dict[tuple[int, int], int] = {}
    shared, wholes = [0] * grid.programs, [0] * grid.programs
    for program in range(grid.programs):
        grid.program = program
        start, end, segments, first_whole, whole, per = hopper_work.share(steps, tiles, workers, cost, shares)
        wholes[program] = whole
        for index in range(segments + whole):
            tile, first, last = hopper_work.segment(index, steps, start, end, segments, first_whole)
            assert 0 <= first < last <= steps and 0 <= tile < tiles
            assert index < segments or (first, last) == (0, steps)
            shared[program] += last - first if index < segments else 0
            for step in range(first, last):
                assert (tile, step) not in held
                held[tile, step] = program
                if index < segments:
                    assert hopper_work.holder(tile * steps + step, per, workers, cost) == program
    assert len(held) == tiles * steps
    for tile in range(tiles):
        holders = [held[tile, step] for step in range(steps)]
        assert sorted(set(holders)) == list(range(holders[0], holders[-1] + 1)), "owners count shares by numbers"

    if not shares and tiles < grid.programs:
        assert sum(shared) == 0 and sorted(set(wholes)) == [0, 1]
        return
    assert len(set(wholes)) == 1, "as many whole tiles each"
    cut = sum(shared) // steps
    if tiles % grid.programs == 0 and not workers:
        assert cut == 0, "complete waves that nothing delays"
    elif tiles >= grid.programs:
        assert grid.programs <= cut < 2 * grid.programs, "one or two waves"
    most = -(-(sum(shared) + workers * cost) // grid.programs)
    working = min(workers, grid.programs)
    assert max(shared[working:], default=0) <= most, "no more than an equal share of everything"
    assert max(shared[:working], default=0) <= max(most - cost, 0), "and less by what experts cost"


def test_one_tile_a_program_where_none_is_shared(work: tuple[Any, SimpleNamespace]) -> None:
    """The first programs, which do something for experts, have none as long as there are others."""
    hopper_work, grid = work
    grid.programs = 40
    for program in range(40):
        grid.program = program
        _, _, segments, first_whole, whole, _ = hopper_work.share(28, 28, 12, 9, False)
        assert (segments, whole) == (0, int(program >= 12))
        assert not whole or first_whole == program - 12
