"""The end of a tile of the persistent Hopper kernels, in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def store(
    y, row_tile, token_tile, token_ptr, bias_ptr, order_ptr, y_ptr, M, N, headroom, WG: gl.constexpr, C: gl.constexpr
):
    """Scale by token, add the bias, and write rows in the order of the input."""
    ROWS: gl.constexpr = C.BN // 2
    rows = row_tile * C.BN + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
    tokens = token_tile * C.BM + gl.arange(0, C.BM, gl.SliceLayout(0, y.type.layout))
    y = y * (gl.load(token_ptr + tokens, mask=tokens < M, other=0.0) * headroom)[None, :]
    if C.BIAS:
        y = y + gl.load(bias_ptr + rows, mask=rows < N, other=0.0)[:, None]
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, 4], [0, 1])
    wide = gl.convert_layout(y.to(y_ptr.dtype.element_ty), WIDE)
    rows = row_tile * C.BN + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    tokens = token_tile * C.BM + gl.arange(0, C.BM, gl.SliceLayout(0, WIDE))
    place = tokens
    if C.SORTED:
        place = gl.load(order_ptr + tokens, mask=tokens < M, other=0)
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    gl.store(y_ptr + place.to(gl.int64)[None, :] * N + rows[:, None], wide, mask=mask)
