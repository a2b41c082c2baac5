"""Rows of a comparison: methods side by side on one model, one set of questions and one set of calibration samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quant_experts.artifacts import Event, GroupRecord
from quant_experts.evaluation.bootstrap import Interval

if TYPE_CHECKING:
    from PIL.Image import Image

Score = Interval
"""A mean over questions with its 95% bootstrap interval."""

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class MethodRow:
    """One method at one scheme."""

    method: str
    """A recipe's name, or `FULL_PRECISION`."""
    scheme: str
    """"W4A6" ..., or "" for full precision."""
    accuracy: dict[str, Score]
    """Exact match in [0, 1] by kind of question, and "average" over all questions."""
    nll: Score
    """Negative log-likelihood of the reference answer per token, in nats."""
    kl: Score | None = None
    """KL(full precision || method) per answer token, in nats; None for full precision."""
    bits_per_weight: float | None = None
    """Stored bits of everything a quantized linear needs, per weight; None for full precision."""
    quantize_seconds: float | None = None
    peak_bytes: int | None = None
    evaluate_seconds: float | None = None
    layer_error: float | None = None
    """Squared output error over that of plain rounding on held-out tokens, geometric mean over quantized linears."""
    oracle_layer_error: float | None = None
    """The same if each token had the expert that serves it best; None without routed experts."""
    overfit: float | None = None
    """Error on held-out tokens over that on tokens that factors were fitted to, geometric mean over quantized
    linears."""
    base_flops: int | None = None
    """Operations of one token in all quantized linears (2 a multiply-add), integer base alone."""
    repair_flops: int | None = None
    """What smoothing, rotation, experts and router add to them."""
    token_bytes: int | None = None
    """Bytes of quantized linears that decoding one token reads."""
    over_rtn: dict[str, Score] = field(default_factory=dict)
    """By measure ("accuracy", "nll", "kl"): by how much the row is better than `rtn` at its scheme, paired by
    question."""
    behind_best: dict[str, Score] = field(default_factory=dict)
    """By measure: by how much the row is worse than the best of its scheme, paired by question. A tie if the interval
    holds 0; the best row itself has none."""


@dataclass(frozen=True)
class AnswerExample:
    """One question as each method answers it."""

    question: str
    reference: str
    image: Image | None
    answers: dict[str, str]
    """Label ("full precision", "paper W4A6", ...) -> answer."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a report of a comparison shows."""

    title: str
    model: str
    command: str
    """The command that repeats it."""
    questions: int
    rows: tuple[MethodRow, ...]
    layers: dict[str, tuple[GroupRecord, ...]] = field(default_factory=dict)
    """Label of a row ("paper W4A6") -> its records."""
    answers: tuple[AnswerExample, ...] = ()
    events: dict[str, tuple[Event, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Library -> version, and "machine" -> what it ran on."""
