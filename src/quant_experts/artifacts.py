"""What the stages hand to each other. Plain data: no I/O, no methods that decide anything.

Letters in shapes: T tokens, K input channels of a group, N output channels (stacked over the group's linears where
said), R rank, E routed experts, G quantization groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class Modality(IntEnum):
    """What a token is, which decides how its error is reported (and, in MBQ, weighted)."""

    TEXT = 0
    """System, user text and template tokens."""
    IMAGE = 1
    """Placeholders that the model replaces by image features."""
    ANSWER = 2
    """The reference answer, which the model would generate."""


@dataclass(frozen=True)
class Sample:
    """One question with its reference answer and any number of images."""

    question: str
    answer: str
    images: tuple[Image, ...] = ()
    where: str = field(default="", compare=False)
    """The file and line it was read from, or the like, for errors"""


@dataclass(frozen=True)
class CalibrationBatch:
    """One sample as the model takes it: a single unpadded sequence."""

    inputs: dict[str, Tensor]
    """Processor output: `input_ids` (1, T), `attention_mask` (1, T), image tensors under the names that the model
    expects."""
    modality: Tensor
    """(T,) int8 of `Modality`."""


@dataclass(frozen=True)
class Event:
    """Something a reader of the report must know: a layer left out, a numerical fallback, a sample dropped."""

    where: str
    what: str


@dataclass
class GroupStatistics:
    """What calibration keeps of one input group's tokens x (T, K), before any smoothing."""

    mean_abs: Tensor
    """(K,) float64, mean of |x| over tokens."""
    second_moment: Tensor
    """(K, K) float64, mean of x x^T over tokens."""
    important: Tensor
    """(T, k) int32, the k channels of largest |x_t| * mean|W| for each token, unordered."""
    modality: Tensor
    """(T,) int8 of `Modality`."""
    reservoir: Tensor
    """(S, K) float32, a uniform sample of tokens, S bounded."""
    reservoir_modality: Tensor
    """(S,) int8."""
    absmax: Tensor
    """(K,) float64, the largest |x| of any token."""
    max_mean_abs: Tensor
    """(K,) float64, the largest over samples of the mean of |x| over a sample's tokens (LQER)."""

    fit_tokens: Tensor | None = None
    """(F, K) float32, a uniform sample of the tokens behind the sums above, F bounded; None unless asked for."""
    reservoir_position: Tensor | None = None
    """(S,) float32 in [0, 1), where each token stands in its sequence; NaN where that is not known. None: nowhere."""

    @property
    def tokens(self) -> int:
        """T, the number of tokens seen."""
        return len(self.modality)


@dataclass
class QuantizedWeight:
    """Integer codes of one linear: W is close to (codes - zero_point) * scale, group by group.

    Codes are stored signed for asymmetric grids too (2^(b-1) is taken off codes and zero point alike), so that integer
    kernels see one kind of operand.
    """

    codes: Tensor
    """(N, K) int8 in [-2^(b-1), 2^(b-1) - 1]."""
    scale: Tensor
    """(N, G) float32, with values that the format holds (`checkpoint.schema.scale_dtype`)."""
    zero_point: Tensor | None
    """(N, G) int8, or None for a symmetric grid (zero point 0)."""
    bits: int
    group_size: int | None
    """Input channels per scale; None: all K of them, G = 1. The last group may be short."""


@dataclass
class LowRankExpert:
    """A correction up @ down added to the quantized weight."""

    up: Tensor
    """(N, R)"""
    down: Tensor
    """(R, K)"""


@dataclass
class ChannelClusters:
    """Channels that are important together, as routed experts were made from them."""

    similarity: Tensor
    """(C, C) float64, normalised pointwise mutual information."""
    labels: Tensor
    """(C,) int64, the expert of each channel."""


@dataclass
class RoutedExperts:
    """E corrections, of which each token uses one."""

    up: Tensor
    """(E, N, R)"""
    down: Tensor
    """(E, R, K)"""


@dataclass
class Router:
    """Scores each expert's remaining error on a token as weight @ |x| + bias; the smallest wins (first on ties)."""

    weight: Tensor
    """(E, K)"""
    bias: Tensor
    """(E,)"""


@dataclass
class QuantizedGroup:
    """One input group, ready to be packed: N is the sum of its linears' outputs, stacked in the order of `linears`."""

    linears: tuple[str, ...]
    """Module names within the block; the first one owns the group's shared tensors."""
    weights: tuple[QuantizedWeight, ...]
    smooth_scale: Tensor | None = None
    """(K,) float32; the input is divided by it. None: no smoothing."""
    rotation: int = 0
    """Block of channels mixed by a Hadamard rotation after smoothing; 0 for none. Weights and factors are for the
    rotated input."""
    factor_bits: Literal[8, 16] = 16
    """How factors are stored."""
    shared_reads: Literal["values", "codes"] = "values"
    """What the shared expert multiplies: the transformed input, or its codes where activations are rounded."""
    shared: LowRankExpert | None = None
    routed: RoutedExperts | None = None
    router: Router | None = None
    clusters: ChannelClusters | None = None
    """For the report; not stored in the checkpoint."""


@dataclass
class GroupRecord:
    """What the report says of one group. Errors are squared output errors over the squared full-precision output."""

    linears: tuple[str, ...]
    tokens: int
    shape: tuple[int, int]
    """(N, K), stacked."""
    stored_bits: int
    """Bits of every tensor that the group's linears need, biases left out."""
    weights: int
    """N * K."""
    error: dict[str, float] = field(default_factory=dict)
    """Relative output error on reservoir tokens by modality name and "all", with activation rounding."""
    calibration_error: float | None = None
    """As `error["all"]`, on tokens that the factors were fitted to: what `error` has more is overfitting."""
    rtn_error: dict[str, float] = field(default_factory=dict)
    """The same for plain rounding of this group at the same scheme."""
    channel_frequency: dict[str, list[float]] = field(default_factory=dict)
    """By modality name: share of tokens for which a channel is important, channels sorted by their share over all
    tokens."""
    expert_use: dict[str, list[float]] = field(default_factory=dict)
    """By modality name: share of tokens that each routed expert serves."""
    expert_positions: dict[str, list[list[int]]] = field(default_factory=dict)
    """By modality name: how many tokens each routed expert serves (a list an expert) in each of some equal parts of
    the sequence, from its first token to its last."""
    oracle_error: dict[str, float] = field(default_factory=dict)
    """As `error`, if each token had the expert that leaves it the smallest error; empty without routed experts."""
    important_tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    """By modality name: the important channels of a few tokens, as places in the order of `channel_frequency`."""
    similarity: list[list[int]] = field(default_factory=list)
    """Similarity of some clustered channels, in percent, in the order of their clusters."""
    clusters: list[int] = field(default_factory=list)
    """Cluster of each of these channels, ascending."""
    base_flops: int = 0
    """Operations a token takes in the integer base (see checkpoint/costs.py)."""
    repair_flops: int = 0
    """The same of smoothing, rotation, experts and router."""
    token_bytes: int = 0
    """Bytes read for one token in decoding."""
