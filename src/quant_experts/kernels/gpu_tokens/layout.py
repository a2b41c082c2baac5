"""Tokens and experts in GPU memory, as both kinds of linears take them.

Experts. The shared expert, if any, and the routed ones are stacked into F factors of one rank R, padded with zeros to
a power of two, at least 32. `hidden` (M, F R) holds zeros for the experts that a token does not use, so that a product
over the columns of any factor is right for every token of a tile, whatever their experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.config import ActivationFormat
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.gpu.caching import CopiedByFields
from quant_experts.kernels.gpu.factors import RANK_MULTIPLE, ROTATIONS, headroom_of, stack_factors
from quant_experts.kernels.gpu.launch import INTERPRETED, hopper
from quant_experts.kernels.operands import GroupOperands, Prepared
from quant_experts.kernels.reference import FP8_LARGEST, hadamard, rotate

BLOCK = 128
"""Input channels are padded to a multiple of this,"""
VALUE_BLOCK = 256
"""and of values to a multiple of this."""
MAX_FACTORS = 31
"""The factors that serve a block of tokens are bits of an int32."""
COUNTS = 32
"""Numbers of eight bytes in two lines of the cache, a count at the start of each."""
MASK_TOKENS = 16
"""Tokens per such int32."""


SETTLED_RANK = 64
"""Of experts that read values, at most, whose hidden values linears for a few tokens settle: they take registers from
all programs."""


class Kind(NamedTuple):
    """What decides how kernels that prepare tokens are cut and compiled."""

    largest_code: int
    """By which a token's largest magnitude is divided; 0 for values, whose units are powers of two."""
    code_type: torch.dtype
    """Of activation codes; of values float16."""
    smooths: bool
    rotation: int
    factors: int
    experts: int
    rank: int
    rows: int
    """Of the projection, 0 without one"""
    row_bytes: int
    """Of a number in it"""
    reads_codes: bool
    """Whether it multiplies codes, not values."""
    block: int = BLOCK
    """Input channels are padded to a multiple of it."""

    @property
    def settles_few(self) -> bool:
        """Whether Hopper's linears for a few tokens settle its experts, and project codes for them."""
        return self.rows > 0 and (self.reads_codes or self.rank <= SETTLED_RANK)


@dataclass(frozen=True)
class GroupLayout(CopiedByFields):
    """`GroupOperands` on the GPU."""

    activation_bits: int
    activation_format: ActivationFormat
    rotation: int
    """Of the input, by the kernels; 0 for none."""
    before: GroupOperands | None
    """Smoothing and rotation to do before the kernels, where they cannot fold them into what reads the input."""
    inverse_smooth: Tensor | None
    """(K,) float32: 1 / m"""
    signs: Tensor | None
    """(rotation, rotation): the Hadamard matrix as signs, bfloat16 (float32 in the interpreter); None without"""
    projection: Tensor | None
    """(Kp / 128, F R + 4 EP, 128) bfloat16, or float32 for such inputs: down factors and `router_rows`, both for the
    input as it is: 1 / m and the rotation are folded in. Of an expert that reads codes (Kp / 128, R, 128) int8."""
    rank: int
    """R"""
    router_bias: Tensor | None
    """(E,) float32"""
    factors: int
    """F, the shared and the routed experts together"""
    experts: int
    """E, the routed ones"""
    headroom: float
    """A power of two: hidden values are stored in units of a token's scale times this, in which they fit float16."""
    code_scale: Tensor | None = None
    """(R,) float32, the scales of int8 down factors; None unless codes are read."""
    fp8_projection: Tensor | None = None
    """(Kp / 128, R, 256) e4m3: `in_e4m3` of a projection of fp8 codes, where a linear on Hopper multiplies it."""

    @cached_property
    def kind(self) -> Kind:
        """The numbers among all this."""
        projection, largest = self.projection, largest_code(self.activation_bits, self.activation_format)
        types = {0: torch.float16, FP8_LARGEST: torch.float8_e4m3fn}
        return Kind(
            largest_code=largest,
            code_type=types.get(largest, torch.int8),
            smooths=self.inverse_smooth is not None,
            rotation=self.rotation,
            factors=self.factors,
            experts=self.experts,
            rank=self.rank,
            rows=0 if projection is None else projection.shape[1],
            row_bytes=0 if projection is None else projection.element_size(),
            reads_codes=self.code_scale is not None,
            block=VALUE_BLOCK if largest == 0 else BLOCK,
        )

    @cached_property
    def descriptors(self) -> dict[Any, Any]:
        """As `LinearLayout.descriptors`, of the projection."""
        return {}


@dataclass(frozen=True)
class Tokens(Prepared):
    """`Prepared` on the GPU: `codes` (M, Kp) are of the type of a `Kind`. Rows are sorted by expert where `order` is
    given: row i is token order[i]."""

    hidden: Tensor | None = None
    """(M, F R) float16, in units of token scale * headroom, zero for experts that the token does not use"""
    headroom: float = 1.0
    """See `GroupLayout`."""
    experts: int = 0
    """Routed experts to choose from."""
    present: Tensor | None = None
    """(ceil(M / 16),) int32: bit f is set where factor f serves one of those tokens"""
    order: Tensor | None = None
    """(M,) int32"""
    hidden_comes_later: bool = False
    """Whether a kernel that starts while the last one of `prepare` still runs finds its codes complete, and need wait
    for what else experts ask for only."""
    sums: Tensor | None = None
    """(slices, M, rows of the projection): instead of `hidden` what its parts add up to, for one launch of a linear
    that chooses experts and finishes hidden values itself"""
    projection: Tensor | None = None
    """See `GroupLayout`: where experts read codes, which that linear projects, int8 ones adding to sums of zeros. Of
    fp8 codes it is `fp8_projection`, and there are no sums yet."""
    counts: Tensor | None = None
    """(COUNTS,) int64, zeros: programs of that linear count themselves there, in the lower halves; in the upper ones
    those of few tokens say which factors are present."""
    router_bias: Tensor | None = None
    code_scale: Tensor | None = None
    """See `GroupLayout`: what that linear needs for it."""
    dtype: torch.dtype = torch.float32
    """Of the input, and so of the output."""

    @property
    def has_experts(self) -> bool:
        """Whether there are hidden values, or what a linear makes them of."""
        return self.hidden is not None or self.sums is not None or self.projection is not None


def padded_channels(columns: int, block: int) -> int:
    """Kp: the least positive multiple of a block that is not below K."""
    return max(1, -(-columns // block)) * block


def largest_code(bits: int, activation_format: ActivationFormat) -> int:
    """The largest activation code; 0 for values, of 16 bits, which are kept."""
    if activation_format == "fp8":
        return FP8_LARGEST
    return 0 if bits == 16 else 2 ** (bits - 1) - 1


def padded_experts(experts: int) -> int:
    """Experts as the kernels count them: a power of two, at least 8, which makes 32 rows of router weights."""
    return 1 << max(7, experts - 1).bit_length()


def router_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Router weights (E, K) float64 -> (4 EP, K) float32: three parts that dtype holds, EP = E padded rows each, and as
    many rows of zeros. Products of bfloat16 parts with values of 8 bits are exact."""
    rest = functional.pad(weight, (0, 0, 0, padded_experts(len(weight)) - len(weight)))
    parts = []
    for _ in range(3):
        parts.append(rest.to(dtype).float())
        rest = rest - parts[-1].double()
    return torch.cat([*parts, torch.zeros_like(parts[0])])


def _projection(
    down: Tensor | None, router: Tensor | None, group: GroupOperands, dtype: torch.dtype, block: int
) -> Tensor:
    """down (F, R, K), router weights (E, K), for an input z = H (x / m) -> rows of dtype that read x."""
    parts = []
    inverse = 1.0 if group.smooth_scale is None else group.smooth_scale.double().reciprocal()
    if down is not None:
        parts.append((rotate(down.double(), group.rotation) * inverse).flatten(0, 1).float())
    if router is not None:
        parts.append(router_rows(router.double() * inverse, dtype))
    return _in_blocks(torch.cat(parts).to(dtype), block)


def _in_blocks(rows: Tensor, multiple: int) -> Tensor:
    """(rows, K) -> (Kp / 128, rows, 128), K padded to a multiple: consecutive rows of a block are one contiguous piece
    of memory."""
    padded = functional.pad(rows, (0, -rows.shape[1] % multiple))
    return padded.view(len(rows), -1, BLOCK).transpose(0, 1).contiguous()


def in_e4m3(values: Tensor) -> Tensor:
    """(..., n) int8 -> (..., 2 n) e4m3: of each value 16 a + b, a and b from -8 to 8, 16 a, then b, exactly."""
    high = (values.int() + 8) >> 4
    return torch.cat((16 * high, values - 16 * high), dim=-1).float().to(torch.float8_e4m3fn)


def pack_group(group: GroupOperands, dtype: torch.dtype, device: torch.device) -> GroupLayout:
    """Pad and stack a group's tensors, for inputs of a dtype. Reads values on the host: call it once, after loading.

    Weights that read values are bfloat16, as those of models in such a dtype are; float32 for float32 inputs, where
    speed matters less than agreement with a CPU, and in the interpreter, which has no bfloat16.

    Raises `QuantExpertsError` for more experts than the kernels take.
    """
    precise = INTERPRETED or dtype == torch.float32
    before = None
    if group.rotation and (group.router_weight is not None or group.rotation not in ROTATIONS):  # |H z| does not fold
        before, group = group, replace(group, smooth_scale=None, rotation=0)
    down = stack_factors(group.shared_down, group.routed_down, 1)
    router, bias = group.router_weight, group.router_bias
    headroom, code_scale, projection, fp8_projection = 1.0, None, None, None
    if down is not None:
        largest_sum = float(down.abs().sum(dim=2).max()) if down.numel() else 0.0
        largest = largest_code(group.activation_bits, group.activation_format)
        largest_sum *= {0: 2, FP8_LARGEST: FP8_LARGEST}.get(largest, largest + 1)
        headroom = headroom_of(largest_sum)
        if len(down) > MAX_FACTORS:
            raise QuantExpertsError(
                f"The GPU kernels take up to {MAX_FACTORS} experts of a group, shared one included, and here are "
                f"{len(down)}: load the model with backend='reference'."
            )
    if group.shared_reads_codes:
        assert down is not None and group.shared_down is not None and group.shared_down.scale is not None
        codes, scale = group.shared_down.values, group.shared_down.scale.float()
        rank = down.shape[1] - len(codes)
        projection = _in_blocks(functional.pad(codes, (0, 0, 0, rank)), BLOCK)
        code_scale = functional.pad(scale, (0, rank))
        if group.activation_format == "fp8" and hopper(device):
            fp8_projection = in_e4m3(projection)
    elif down is not None or router is not None:
        block = VALUE_BLOCK if group.activation_bits == 16 else BLOCK
        projection = _projection(down, router, group, torch.float32 if precise else torch.bfloat16, block)
    inverse = None if group.smooth_scale is None else group.smooth_scale.float().reciprocal()
    signs = None
    if group.rotation:
        signs = hadamard(group.rotation, device).sign().to(torch.float32 if INTERPRETED else torch.bfloat16)
    return GroupLayout(
        activation_bits=group.activation_bits,
        activation_format=group.activation_format,
        rotation=group.rotation,
        before=before,
        inverse_smooth=inverse,
        signs=signs,
        projection=projection,
        rank=RANK_MULTIPLE if down is None else down.shape[1],
        router_bias=None if bias is None else bias.float().contiguous(),
        factors=0 if down is None else len(down),
        experts=0 if router is None else len(router),
        headroom=headroom,
        code_scale=code_scale,
        fp8_projection=fp8_projection,
    )
