"""How preparing tokens is cut into launches, by size."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("dtype", "shared_memory", "steps"),
    [(torch.bfloat16, 232_448, 8), (torch.bfloat16, 101_376, 3), (torch.float32, 101_376, 1)],
)
def test_steps_fit_the_chip(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shared_memory: int, steps: int
) -> None:
    """As many steps of a block of 64 tokens as a multiprocessor's shared memory holds."""
    from quant_experts.kernels.gpu_tokens import prepare_launch
    from quant_experts.kernels.gpu_tokens.layout import Kind

    monkeypatch.setattr(prepare_launch, "shared_memory", lambda device: shared_memory)
    kind = Kind(127, torch.int8, False, 0, 9, 8, 32, 320, dtype.itemsize, False)
    assert prepare_launch.stages(kind, dtype, torch.device("cpu"), 32, 100, 64) == steps


@pytest.mark.parametrize(
    ("tokens", "channels", "reads_codes", "code_type", "settled", "expected"),
    [  # projected in `prepare`, counted in the linear, added where they are, beside quantization
        (4, 3584, True, torch.int8, False, (False, True, True, False)),
        (4, 3584, True, torch.int8, True, (True, False, True, False)),
        (17, 3584, True, torch.int8, True, (True, False, False, False)),
        (17, 3584, True, torch.int8, False, (False, True, True, False)),
        (17, 3584, False, torch.int8, False, (True, True, False, True)),
        (17, 3584, True, torch.float8_e4m3fn, False, (False, True, False, False)),
        (4, 3584, True, torch.float8_e4m3fn, True, (True, False, False, False)),
        (4, 3584, False, torch.int8, False, (True, True, False, True)),
        (4, 18944, False, torch.int8, False, (True, True, False, False)),
        (4, 3584, False, torch.int8, True, (True, False, False, True)),
    ],
)
def test_what_prepare_leaves_to_the_linear(
    tokens: int, channels: int, reads_codes: bool, code_type: torch.dtype, settled: bool, expected: tuple[bool, ...]
) -> None:
    from quant_experts.kernels.gpu_tokens.layout import Kind
    from quant_experts.kernels.gpu_tokens.prepare_launch import plan

    experts = 0 if reads_codes else 8
    rows = 64 if reads_codes else 9 * 32 + 32
    kind = Kind(127, code_type, True, 0, experts + 1, experts, 32, rows, 1 if reads_codes else 2, reads_codes)
    p = plan(kind, tokens, channels, torch.bfloat16, torch.device("cpu"), settled)
    assert (p.projects, p.counts, p.adds, p.beside) == expected
    assert p.settled == settled and not p.sorts
    assert p.cut.sums == (1 if p.adds else p.cut.slices)


def test_a_few_tokens_are_projected_by_one_launch_however_long() -> None:
    """On Hopper; neither `begin` nor `project` runs for them then."""
    from quant_experts.kernels.gpu_tokens.layout import Kind
    from quant_experts.kernels.gpu_tokens.prepare_launch import Projector, plan

    kind = Kind(127, torch.int8, True, 0, 9, 8, 32, 320, 2, False)
    p = plan(kind, 4, 18944, torch.bfloat16, torch.device("cpu"), False, Projector.FEW)
    assert p.projects and p.counts and not p.beside
    assert p.cut.projector is Projector.FEW and p.cut.sums == p.cut.slices == p.cut.tile.slices
    assert p.cut.programs == p.cut.slices * 20, "of 16 rows each"


def test_few_outputs_are_not_sorted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_experts.kernels.gpu_tokens import prepare_launch
    from quant_experts.kernels.gpu_tokens.layout import Kind

    monkeypatch.setattr(prepare_launch, "FEW_TOKENS", 512)
    monkeypatch.setattr(prepare_launch, "MOST_IDLE", 1 << 32)  # the interpreter's is another
    kind = Kind(127, torch.int8, True, 0, 9, 8, 32, 320, 2, False)

    def sorts(m: int, n: int, kind: Kind = kind) -> bool:
        return prepare_launch.sorts_tokens(kind, m, n)

    assert not sorts(512, 1 << 20) and sorts(513, 37888) and not sorts(4096, 4608) and sorts(8192, 3584)
    assert sorts(2048, 4608, kind._replace(factors=17, rank=64)), "more factors are idle, and larger ones"
    assert not sorts(100_000, 37888, kind._replace(factors=2, experts=1)), "none is idle"
