"""Counts by which programs of one launch of the Hopper kernels wait for one another, in Gluon.

A count is 64 bits: how many have counted themselves, and in the upper half the sum of a word of each. It is zero when a
launch begins: who uses it says who leaves it so.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper_work import barrier


@gluon.jit
def count_done(count_ptr, word):
    """Of a program, or of a warp group: who has seen the count can read what all its threads wrote before, and has the
    sum of the words."""
    barrier()
    gl.atomic_add(count_ptr, (word.to(gl.int64) << 32) + 1, sem="release")


@gluon.jit
def wait_for(count_ptr, programs):
    """Until so many programs have counted themselves; what they wrote before can be read then. One thread of each warp
    looks (that all do was no slower). -> the sum of their words in that thread, for `told`."""
    at = count_ptr.to(gl.int64, bitcast=True)
    seen, word = seen_by_one(at, programs)
    while seen != programs:
        seen, word = seen_by_one(at, programs)
    barrier()
    return word


@gluon.jit
def told(word):
    """What `wait_for` has returned to one thread of each warp, in all of them."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [word], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def seen_by_one(at, others):
    """The count at an address and the sum of words, in the first thread of each warp, and `others` and 0 in others."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .b32 lane;
            .reg .b64 both;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            mov.b32 $0, $3;
            mov.b32 $1, 0;
            @first ld.acquire.gpu.global.b64 both, [$2];
            @first mov.b64 {$0, $1}, both;
        }
        """,
        "=&r,=&r,l,r", [at, others], dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
