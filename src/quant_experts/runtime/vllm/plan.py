"""Which linears of a checkpoint one layer of vLLM stands for.

vLLM names modules in its own way and fuses linears that read the same input (`qkv_proj` for `q_proj`, `k_proj` and
`v_proj`). Both mappings come from vLLM's model classes, through its configuration (`engine.py`): nothing here is made
for one model, and nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.checkpoint.source import stored_names
from quant_experts.errors import QuantExpertsError

_CUSTOMARY = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What layers of these names fuse where a model's class does not say: in LLaVA-OneVision the vision tower is made
before the language model, whose class tells."""


@dataclass(frozen=True)
class Part:
    """One linear of the checkpoint in a layer."""

    name: str
    """As config.json has it."""
    spec: GroupSpec
    """Its input group."""
    guarded: bool = False
    """Whether files hold the guard in place of its weight (docs/format.md)."""
    rows: int | None = None
    """Its output channels, where the files were looked at."""


class LayerPlan:
    """Finds the quantized linears of each layer, and remembers which were found."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._parts = {
            name: Part(name, spec, guarded=(i, j) == (0, 0))
            for i, spec in enumerate(config.groups)
            for j, name in enumerate(spec.linears)
        }
        """By the name that vLLM has for the linear; at first by that of config.json."""
        self._found: set[str] = set()

    def use_files(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Go over to the names in files, which vLLM's renamings are made for; config.json has those of modules in
        `transformers`. And note how many outputs each linear has.

        shapes: of all tensors in the files. Raises `QuantExpertsError` if they do not hold a linear.
        """
        stored = stored_names(self._parts, shapes)
        for name in self._parts:
            if name not in stored:
                raise QuantExpertsError(
                    f"Tensor '{name}.weight_shape' is missing from the checkpoint: download or quantize it again."
                )
        rows = {name: shapes.get(f"{stored[name]}.weight_scale", (None,))[0] for name in self._parts}
        self._parts = {stored[name]: replace(part, rows=rows[name]) for name, part in self._parts.items()}

    def rename(self, rename: Callable[[str], str | None]) -> None:
        """Take over vLLM's names. A model within a model renames again, and leaves alone what has its final name.

        Raises `QuantExpertsError` if two linears would have one name.
        """
        renamed: dict[str, Part] = {}
        for name, part in self._parts.items():
            other = renamed.setdefault(rename(name) or name, part)
            if other is not part:
                raise QuantExpertsError(
                    f"vLLM has one name for '{other.name}' and '{part.name}': load the checkpoint with transformers."
                )
        self._parts = renamed

    def parts(self, layer: str, fused: Mapping[str, Sequence[str]]) -> tuple[Part, ...]:
        """The quantized linears of a layer in the order of its outputs, none for a layer in full precision.

        Args:
            layer: vLLM's name of it, with its parents'.
            fused: last part of a layer's name -> those of the linears that it fuses.

        Raises:
            QuantExpertsError: only some of the layer's linears are quantized.
        """
        parent, dot, leaf = layer.rpartition(".")
        names = [layer]
        if layer not in self._parts:
            names = [f"{parent}{dot}{name}" for name in fused.get(leaf, _CUSTOMARY.get(leaf, ()))]
        parts = [self._parts[name] for name in names if name in self._parts]
        if not parts:
            return ()
        if len(parts) < len(names):
            missing = next(name for name in names if name not in self._parts)
            raise QuantExpertsError(
                f"vLLM computes '{parts[0].name}' and '{missing}' in one layer ('{layer}'), of which the checkpoint "
                "quantizes the first only: quantize both or neither."
            )
        self._found |= {part.name for part in parts}
        return tuple(parts)

    def check_all_found(self) -> None:
        """Call it when the model is made. Raises `QuantExpertsError` that names a linear which no layer stands for."""
        for part in self._parts.values():
            if part.name not in self._found:
                raise QuantExpertsError(
                    f"vLLM's model has no layer that could hold the quantized '{part.name}' (it computes it as a plain "
                    "torch linear, or in a mixture of experts, or not at all): quantize without the scope that it is "
                    "in, or load the checkpoint with transformers."
                )
