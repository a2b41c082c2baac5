"""Checkpoint formats 1 and 2: what `config.json` says and which tensors stand beside each linear. See docs/format.md.

The shapes are a function of the configuration alone, so that a reader can allocate, check and count bits before it
opens a file.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator

from quant_experts import __version__
from quant_experts.checkpoint.packing import packed_width
from quant_experts.config import FORMAT_VERSION, Recipe, Scheme, StrictModel
from quant_experts.errors import QuantExpertsError

QUANT_METHOD: Final = "quant_experts"
GROUP_CHILD = "input_group"
"""Name of the submodule of a group's first linear that owns the group's shared tensors."""
FACTOR_DTYPE = torch.float16
GROUP_SCALE_DTYPE = torch.bfloat16
"""Of the scales of weight groups. bfloat16 has float32's range, so that no weight is too small or too large for it, and
its coarser steps cost nothing: codes are chosen for the scale that is stored (EXPERIMENTS.md)."""

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype)."""


class GroupSpec(StrictModel):
    """One input group of a checkpoint."""

    linears: tuple[str, ...] = Field(min_length=1, description="module names; the first owns the shared tensors")
    smooth: bool = False
    rotation: int = Field(default=0, ge=0, description="block of channels mixed by a Hadamard rotation; 0 for none")
    shared_rank: int = Field(default=0, ge=0)
    routed_rank: int = Field(default=0, ge=0)
    experts: int = Field(default=0, ge=0)
    factor_bits: Literal[8, 16] = 16
    shared_reads: Literal["values", "codes"] = "values"

    @model_validator(mode="after")
    def _experts_with_rank(self) -> GroupSpec:
        if (self.experts > 0) != (self.routed_rank > 0):
            raise ValueError("experts and routed_rank must both be zero or both be positive")
        if self.rotation & (self.rotation - 1):
            raise ValueError(f"rotation is {self.rotation}; it must be a power of two")
        if self.shared_reads == "codes" and (not self.shared_rank or self.experts or self.factor_bits != 8):
            raise ValueError("shared_reads codes needs a shared expert with factor_bits 8 and no routed experts")
        return self


class CheckpointConfig(StrictModel):
    """The `quantization_config` entry of `config.json`."""

    quant_method: Literal["quant_experts"] = QUANT_METHOD
    format_version: int = 1
    library_version: str = __version__
    scheme: Scheme
    recipe: Recipe
    seed: int = 0
    groups: tuple[GroupSpec, ...]
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _version_knows_the_scheme(self) -> CheckpointConfig:
        if self.format_version < self.scheme.format_version:
            raise ValueError(
                f"format_version is {self.format_version}; {self.scheme} needs {self.scheme.format_version}"
            )
        return self

    @classmethod
    def read(cls, value: dict[str, Any]) -> CheckpointConfig:
        """Validate `quantization_config`. Raises `QuantExpertsError` for a newer format or an unknown key."""
        version = value.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise QuantExpertsError(f"quantization_config has no valid format_version (found {version!r}).")
        if version > FORMAT_VERSION:
            raise QuantExpertsError(
                f"The checkpoint has format version {version}, this installation reads up to {FORMAT_VERSION}: "
                "upgrade quant-experts."
            )
        return cls.from_json(value)


def group_tensors(spec: GroupSpec, in_features: int) -> TensorSpecs:
    """Tensors of a group's shared part, K = in_features."""
    tensors: TensorSpecs = {}
    if spec.smooth:
        tensors["smooth_scale"] = ((in_features,), torch.float32)
    if spec.shared_rank:
        tensors |= _factor("shared_down", (spec.shared_rank, in_features), spec)
    if spec.experts:
        tensors |= _factor("routed_down", (spec.experts, spec.routed_rank, in_features), spec)
        tensors["router_weight"] = ((spec.experts, in_features), FACTOR_DTYPE)
        tensors["router_bias"] = ((spec.experts,), FACTOR_DTYPE)
    return tensors


def linear_tensors(spec: GroupSpec, scheme: Scheme, out_features: int, in_features: int) -> TensorSpecs:
    """Tensors of one linear of the group, bias left out."""
    bits, scales = scheme.weight_bits, 1 if scheme.group_size is None else -(-in_features // scheme.group_size)
    tensors: TensorSpecs = {
        "weight_packed": ((out_features, packed_width(in_features, bits)), torch.int32),
        "weight_scale": ((out_features, scales), scale_dtype(scheme.group_size)),
        "weight_shape": ((2,), torch.int32),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = ((scales, packed_width(out_features, bits)), torch.int32)
    if spec.shared_rank:
        tensors |= _factor("shared_up", (out_features, spec.shared_rank), spec)
    if spec.experts:
        tensors |= _factor("routed_up", (spec.experts, out_features, spec.routed_rank), spec)
    return tensors


def scale_dtype(group_size: int | None) -> torch.dtype:
    """Of weight scales: float32 for one a channel, of which there are few; half precision where groups have their
    own."""
    return torch.float32 if group_size is None else GROUP_SCALE_DTYPE


def _factor(name: str, shape: tuple[int, ...], spec: GroupSpec) -> TensorSpecs:
    """An expert's factor: float16, or int8 with a scale for each row."""
    if spec.factor_bits == 16:
        return {name: (shape, FACTOR_DTYPE)}
    return {name: (shape, torch.int8), f"{name}_scale": (shape[:-1], torch.float32)}


def stored_bits(tensors: TensorSpecs) -> int:
    """Bits that the tensors take in a file."""
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in tensors.values())


def group_stored_bits(spec: GroupSpec, scheme: Scheme, out_features: tuple[int, ...], in_features: int) -> int:
    """Bits of every tensor that a group's linears need, biases left out (they are the same in any scheme)."""
    own = sum(stored_bits(linear_tensors(spec, scheme, n, in_features)) for n in out_features)
    return own + stored_bits(group_tensors(spec, in_features))
