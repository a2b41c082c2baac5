"""What linears for a few tokens on Hopper GPUs do alike, in Gluon: loads where not every warp has a block of
channels, and experts, of whose ranks a warp takes some runs. All of it goes to registers as it lies (`gpu.hopper`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import RUN, across, factor_of, multiply
from quant_experts.kernels.gpu.hopper_counts import told, wait_for


@gluon.jit
def load_there(at, there, EVEN: gl.constexpr):
    """What is there, and zeros. EVEN: all of it is."""
    if EVEN:
        return gl.load(at)
    else:
        return gl.load(at, mask=there, other=0)


@gluon.jit
def run_of(start, present, WAYS: gl.constexpr, F: gl.constexpr, R: gl.constexpr, USED: gl.constexpr,
    HALVES: gl.constexpr):  # fmt: skip
    """-> factor, or F, and first rank of the run of ranks of each warp, from the start-th run of present factors on."""
    run = start + across(WAYS, 0, HALVES)
    return factor_of(run // (R // RUN), present, F, USED), run % (R // RUN) * RUN + across(RUN, 2, HALVES)


@gluon.jit
def ask_for_ups(
    up_ptr, present, first, N, BN: gl.constexpr, WAYS: gl.constexpr, F: gl.constexpr, R: gl.constexpr,
    USED: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Up factors of the runs of ranks of each warp."""
    row = first.to(gl.int64) + across(BN, 1, HALVES)
    ups = ()
    for start in gl.static_range(0, USED * (R // RUN), WAYS):
        factor, rank = run_of(start, present, WAYS, F, R, USED, HALVES)
        ups = ups + (gl.load(up_ptr + (row + factor * N) * R + rank, mask=factor < F, other=0.0),)
    return ups


@gluon.jit
def ask_for_hiddens(
    hidden_ptr, present, M, BM: gl.constexpr, WAYS: gl.constexpr, F: gl.constexpr, R: gl.constexpr, USED: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """Settled hidden values (M, F R) of the runs of ranks of each warp."""
    token = across(BM, 1, HALVES)
    hiddens = ()
    for start in gl.static_range(0, USED * (R // RUN), WAYS):
        factor, rank = run_of(start, present, WAYS, F, R, USED, HALVES)
        at = hidden_ptr + token * (F * R) + factor * R + rank
        hiddens = hiddens + (gl.load(at, mask=(factor < F) & (token < M), other=0.0, cache_modifier=".cg"),)
    return hiddens


@gluon.jit
def wait_for_factors(settled_ptr, settlers, present_ptr, E: gl.constexpr, SETTLES: gl.constexpr):
    """-> which factors are present, when hidden values are there: when so many programs have counted themselves at
    `settled_ptr` where the launch SETTLES them, else at once."""
    present = 1
    if SETTLES and E > 0:
        present = told(wait_for(settled_ptr, settlers))
    elif SETTLES:
        wait_for(settled_ptr, settlers)
    elif E > 0:
        present = gl.load(present_ptr, cache_modifier=".cg")
    return present


@gluon.jit
def expert_sums(ups, hiddens, MMA: gl.constexpr):
    """(rows, tokens): up factors times hidden values, of all warps together."""
    WAYS: gl.constexpr = ups[0].shape[0]
    ROWS: gl.constexpr = ups[0].shape[1]
    TOKENS: gl.constexpr = hiddens[0].shape[1]
    sums = gl.zeros([WAYS, ROWS, TOKENS], gl.float32, MMA)
    for i in gl.static_range(len(ups)):
        sums = multiply(ups[i], hiddens[i], sums, 2)
    return gl.sum(sums, axis=0)
