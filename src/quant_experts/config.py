"""Frozen, validated, versioned configuration: what to quantize to (`Scheme`) and how to repair it (`Recipe`).

Both round-trip through JSON, refuse unknown keys and are what a checkpoint's `config.json` records.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from quant_experts.errors import QuantExpertsError

FORMAT_VERSION = 2
"""The newest checkpoint format. A checkpoint says the oldest that holds it (`Scheme.format_version`), so that older
installations read all that they can."""

Config = TypeVar("Config", bound="StrictModel")

MAX_PIXELS = 1280 * 28 * 28
"""Area to which larger images are scaled down: 1,280 tokens of Qwen2-VL."""

Scope = Literal["vision", "merger", "language"]
"""A part of the model that can be quantized: the blocks of the vision encoder, what stands between it and the language
model, the blocks of the language model."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""In the order in which a forward pass comes to them."""
DEFAULT_SCOPES: tuple[Scope, ...] = ("language",)

ActivationFormat = Literal["int", "fp8"]
"""What activation codes are: integers, or fp8 numbers e4m3fn (OCP: 4 bits of exponent, 3 of mantissa, largest 448)."""
MOST_WEIGHT_BITS: dict[ActivationFormat, int] = {"int": 8, "fp8": 4}
"""fp8 products take weight codes as fp8 numbers too: e4m3 holds integers up to 16 exactly, and so codes of 4 bits with
their zero point taken off."""

PAPER_WIDTH = 1536
"""Width of Qwen2-VL-2B, the model on which the paper's rank 64 and k = 32 were chosen."""


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and reports errors as one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_json(cls: type[Config], value: dict[str, Any]) -> Config:
        """Validate a plain dict; raises `QuantExpertsError` that names each offending key."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
                for e in error.errors()
            )
            raise QuantExpertsError(f"Invalid {cls.__name__}: {problems}.") from error

    def to_json(self) -> dict[str, Any]:
        """The dict that `from_json` reads back to an equal object."""
        return self.model_dump(mode="json")


class Scheme(StrictModel):
    """Grids of one linear layer (integer grids as in thu-nics/MBQ; see docs/math.md).

    Weights are integers, quantized per output channel (`group_size` None) or per `group_size` input channels;
    activations integers or fp8 numbers, quantized per token, dynamically and symmetrically, or not at all (16 bits:
    they keep the compute dtype).
    """

    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int
    group_size: int | None = Field(default=None, ge=2)
    symmetric: bool = True
    activation_format: ActivationFormat = "int"

    @model_validator(mode="after")
    def _known_activation(self) -> Scheme:
        if self.activation_bits != 16 and not 4 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits is {self.activation_bits}; it must be 4 to 8, or 16 for weight-only")
        if self.activation_format == "fp8" and self.activation_bits != 8:
            raise ValueError(f"activation_bits is {self.activation_bits}; fp8 activations have 8")
        most = MOST_WEIGHT_BITS[self.activation_format]
        if self.weight_bits > most:
            raise ValueError(
                f"weight_bits is {self.weight_bits}; with {self.activation_format} activations it is at most {most}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_default_format(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Integer activations are not written, so that format 1 is what it was before there were others."""
        value: dict[str, Any] = serialize(self)
        if self.activation_format == "int":
            del value["activation_format"]
        return value

    @property
    def weight_only(self) -> bool:
        """True when activations stay in floating point."""
        return self.activation_bits == 16

    @property
    def format_version(self) -> int:
        """The oldest checkpoint format that knows the scheme."""
        return 1 if self.activation_format == "int" else 2

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read `W4A6`, `W4A8g128`, `W3A16`, `W4A16g64-sym`, `W4A16pc`, `W4Afp8` ...

        `W<bits>A<bits>` or `W<bits>Afp8` (weights of at most 4 bits), then optionally `g<size>` (weights in groups of
        that many input channels) or `pc` (per output channel), then optionally `-sym` or `-asym`. Defaults follow the
        MBQ code: weight-and-activation schemes are symmetric per channel, weight-only ones asymmetric in groups of 128.
        """
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"W(\d+)A(\d+|fp8)(?:g(\d+)|(pc))?(?:-(sym|asym))?", text.strip(), re.IGNORECASE)
        if match is None:
            raise QuantExpertsError(
                f"Unknown scheme '{text}': write weight and activation bits as in W4A6, W4A8, W3A16, "
                "W4A16g64-sym or W4Afp8."
            )
        activation_format = "fp8" if match[2].lower() == "fp8" else "int"
        weight_bits, activation_bits = int(match[1]), 8 if activation_format == "fp8" else int(match[2])
        weight_only = activation_bits == 16
        group_size = int(match[3]) if match[3] else None if match[4] or not weight_only else 128
        symmetric = match[5].lower() == "sym" if match[5] else not weight_only
        return cls.from_json(
            dict(
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                group_size=group_size,
                symmetric=symmetric,
                activation_format=activation_format,
            )
        )

    def __str__(self) -> str:
        text = f"W{self.weight_bits}A{'fp8' if self.activation_format == 'fp8' else self.activation_bits}"
        if self.group_size != (128 if self.weight_only else None):
            text += f"g{self.group_size}" if self.group_size else "pc"
        if self.symmetric == self.weight_only:
            text += "-sym" if self.symmetric else "-asym"
        return text


class Recipe(StrictModel):
    """How a group is quantized and how the error of rounding is repaired, stage by stage in the order of the fields."""

    name: str
    smoothing: Literal["none", "exempt", "smoothquant", "awq", "mbq", "balanced"] = Field(
        default="none",
        description="per-channel scale that moves difficulty from activations to weights: none; of the exempt channels"
        " only (ASER, Quant Experts); SmoothQuant's; AWQ's or MBQ's search; or the one that balances the expected"
        " errors of weights and activations (ours)",
    )
    rotation: int = Field(
        default=0,
        ge=0,
        description="largest block of input channels that a Hadamard rotation mixes before rounding; 0 for none",
    )
    exempt: Literal["none", "magnitude", "frequency"] = Field(
        default="none",
        description="which input channels are left out of the base and rebuilt by the shared expert: none; those "
        "with the largest mean|x| * mean|W| (ASER); or those most often among a token's top k (Quant Experts, C_s)",
    )
    important_channels: int = Field(
        default=32,
        ge=1,
        description="k: how many channels are important for a token, and the number of exempt channels",
    )
    base: Literal["rtn", "gptq"] = Field(default="rtn", description="rounds to nearest, or with error feedback (GPTQ)")
    act_order: bool = Field(default=False, description="GPTQ goes from the input channel of most energy to the least")
    clip: bool = Field(default=False, description="search the range of each grid that leaves the least weighted error")
    shared: Literal["moment", "rms", "mean_abs", "principal"] = Field(
        default="moment",
        description="what the shared expert is: the best correction for the inputs' second moments (whitened SVD:"
        " ASER, QERA-exact), for their diagonal (QERA-approx), for mean magnitudes (LQER); or the weight's own"
        " principal part, taken out before rounding (SVDQuant)",
    )
    shared_rank: int = Field(default=0, ge=0, description="rank of the shared expert; 0 for none")
    routed: Literal["co_importance", "random", "tokens"] = Field(
        default="co_importance",
        description="what routed experts are fitted to: clusters of channels that are important together (Quant "
        "Experts), random clusters (a control), or the tokens that each serves best (ours)",
    )
    routed_rank: int = Field(default=0, ge=0, description="rank of each routed expert; 0 for none")
    num_experts: int = Field(
        default=8, ge=1, le=128, description="N_r: the number of routed experts; each token uses one"
    )
    router: Literal["magnitude", "fitted", "random"] = Field(
        default="magnitude",
        description="scores an expert by |x|-weighted residuals (Quant Experts), by a fit to true residuals (ours), or "
        "at random (a control)",
    )
    factor_bits: Literal[8, 16] = Field(default=16, description="how expert factors are stored: int8 with scales, fp16")
    shared_reads: Literal["values", "codes"] = Field(
        default="values",
        description="what the shared expert reads: the input before rounding, or its codes, so that its down product is"
        " one of integers (ours); weight-only schemes have no codes and always read values",
    )
    refine: bool = Field(default=False, description="train routed experts and router on the layer's output afterwards")
    group_inputs: bool = Field(
        default=True, description="treat linears that read one tensor together; share their factors"
    )
    scale_with_width: bool = Field(
        default=False,
        description="multiply ranks and k by (model width / 1536), the width at which the paper chose them",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.exempt != "none" and self.shared_rank == 0:
            raise ValueError("exempt channels need a shared expert to rebuild them: set shared_rank")
        if self.smoothing == "exempt" and self.exempt == "none":
            raise ValueError("smoothing of exempt channels needs exempt channels: set exempt")
        if self.refine and not self.routed_rank:
            raise ValueError("refinement trains routed experts: set routed_rank")
        if self.shared_reads == "codes" and (self.routed_rank or self.factor_bits != 8):
            raise ValueError("shared_reads codes needs factor_bits 8 and no routed experts")
        if self.shared_reads == "codes" and self.exempt != "none":
            raise ValueError("exempt channels are rebuilt from values that are not rounded: set shared_reads to values")
        if self.rotation and self.exempt != "none":
            raise ValueError("a rotation mixes channels, so that none can be exempt: set exempt to none")
        if self.rotation and self.routed_rank and self.routed != "tokens":
            raise ValueError("a rotation mixes the channels that experts are clustered from: set routed to tokens")
        if self.rotation and self.rotation & (self.rotation - 1):
            raise ValueError(f"rotation is {self.rotation}; it must be a power of two")
        return self

    def at_width(self, width: int) -> Recipe:
        """The recipe with absolute numbers for a model of that hidden size.

        Where `scale_with_width` is set, ranks and k become a multiple of 8 nearest to (paper's number) * width / 1536,
        at least 8.
        """
        if not self.scale_with_width:
            return self

        def scale(value: int) -> int:
            return max(8, 8 * round(value * width / PAPER_WIDTH / 8)) if value else 0

        return self.model_copy(
            update=dict(
                important_channels=scale(self.important_channels),
                shared_rank=scale(self.shared_rank),
                routed_rank=scale(self.routed_rank),
                scale_with_width=False,
            )
        )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="rtn"),
        Recipe(name="smoothquant", smoothing="smoothquant"),
        Recipe(name="awq", smoothing="awq"),
        Recipe(name="mbq", smoothing="mbq"),
        Recipe(name="gptq", base="gptq"),
        # Static adapters, per linear as published: rank 32 at 4 bits, 64 at 3 bits (LQER, QERA).
        Recipe(name="lqer", shared="mean_abs", shared_rank=32, group_inputs=False),
        Recipe(name="lqer-r64", shared="mean_abs", shared_rank=64, group_inputs=False),
        Recipe(name="qera-approx", shared="rms", shared_rank=32, group_inputs=False),
        Recipe(name="qera-approx-r64", shared="rms", shared_rank=64, group_inputs=False),
        Recipe(name="qera", shared="moment", shared_rank=32, group_inputs=False),
        Recipe(name="qera-r64", shared="moment", shared_rank=64, group_inputs=False),
        Recipe(name="svdquant", smoothing="smoothquant", shared="principal", shared_rank=32),
        Recipe(name="aser", smoothing="exempt", exempt="magnitude", shared_rank=64),
        Recipe(
            name="paper", smoothing="exempt", exempt="frequency", shared_rank=32, routed_rank=32, group_inputs=False
        ),
        Recipe(
            name="paper-refined",
            smoothing="exempt",
            exempt="frequency",
            shared_rank=32,
            routed_rank=32,
            refine=True,
            group_inputs=False,
        ),
        Recipe(
            name="quant-experts",
            smoothing="balanced",
            rotation=64,
            base="gptq",
            act_order=True,
            clip=True,
            shared_rank=64,
            factor_bits=8,
            shared_reads="codes",
        ),
    )
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name, or the recipe itself. Raises `QuantExpertsError` for a name that does not exist."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise QuantExpertsError(f"Unknown recipe '{recipe}': choose one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]


class QuantizationConfig(StrictModel):
    """Everything that decides the result of `quantize`, apart from the model and the samples themselves."""

    scheme: Scheme
    recipe: Recipe
    seed: int = Field(default=0, ge=0, lt=2**32)
    samples: int = Field(default=128, ge=1, description="how many calibration samples to use at most")
    max_tokens: int = Field(default=2048, ge=1, description="longest sample in tokens")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="larger images are scaled down to this area")
    scopes: tuple[Scope, ...] = Field(
        default=DEFAULT_SCOPES, min_length=1, description="which parts of the model are quantized"
    )

    @field_validator("scopes")
    @classmethod
    def _in_order(cls, scopes: tuple[Scope, ...]) -> tuple[Scope, ...]:
        """One tuple for each combination, whatever order it was given in."""
        return tuple(scope for scope in SCOPES if scope in scopes)

    def to_json(self) -> dict[str, Any]:
        """As for any `StrictModel`; the default scopes are not written, so that a run from before there were others is
        the same run."""
        value = super().to_json()
        if self.scopes == DEFAULT_SCOPES:
            del value["scopes"]
        return value

    @classmethod
    def of(
        cls,
        scheme: str | Scheme = "W4A6",
        recipe: str | Recipe = "quant-experts",
        *,
        scale_with_width: bool = False,
        scopes: Sequence[str] = DEFAULT_SCOPES,
        **limits: int,
    ) -> QuantizationConfig:
        """From names: `QuantizationConfig.of("W4A6", "quant-experts", scopes=["vision", "language"], samples=64)`.

        scale_with_width: let the recipe's ranks follow the model's width (see `Recipe`). Raises `QuantExpertsError` for
        a scheme, recipe, scope or limit that does not exist.
        """
        chosen = find_recipe(recipe)
        if scale_with_width:
            chosen = chosen.model_copy(update=dict(scale_with_width=True))
        return cls.from_json(dict(scheme=Scheme.parse(scheme), recipe=chosen, scopes=tuple(scopes), **limits))
