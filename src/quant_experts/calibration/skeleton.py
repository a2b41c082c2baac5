"""A model whose blocks are not there: everything else is loaded by `transformers`, the blocks wait on disk.

Each block's place is taken by a `PausingBlock`, which hands its arguments to whoever drives the forward pass and waits
for the output. The real blocks are kept aside without memory (meta device) and filled one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_experts.checkpoint.source import TensorFiles, module_names
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.loading import load_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Pause = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Called with a block's index and arguments; returns the block's output."""


class PausingBlock(nn.Module):
    """Stands where a block stood, and answers to the block's attributes (models read some of them between blocks)."""

    def __init__(self, index: int, block: nn.Module, pause: Pause) -> None:
        super().__init__()
        object.__setattr__(self, "_stood_for", block)  # not registered: it has no memory to load
        self._index, self._pause = index, pause

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_stood_for"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the driver returns for this block."""
        return self._pause(self._index, args, kwargs)


@dataclass
class Skeleton:
    """A model without its blocks, and what is needed to bring each block in."""

    model: PreTrainedModel
    block_names: list[str]
    files: TensorFiles
    keys: dict[str, str]
    """The model's tensor names -> keys in the files."""
    dtype: torch.dtype
    """Compute dtype."""
    _blocks: list[nn.Module]

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """The block with its weights, on a device, in the compute dtype. The caller frees it with `release_block`.

        Raises `QuantExpertsError` if a tensor is missing, damaged or not finite.
        """
        block, prefix = self._blocks[index], self.block_names[index]
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            full = f"{prefix}.{name}"
            if full in self.keys:
                value = self.files.read_finite(self.keys[full]).to(device=device)
                if tuple(value.shape) != tuple(tensor.shape):
                    raise QuantExpertsError(
                        f"Tensor '{full}' has shape {list(value.shape)}, the model needs {list(tensor.shape)}: "
                        "its files do not belong together."
                    )
                _set_tensor(block, name, value.to(self.dtype) if value.is_floating_point() else value)
            elif isinstance(tensor, nn.Parameter):
                raise QuantExpertsError(
                    f"Tensor '{full}' is missing, or stored in a form that has to be converted (fused experts): "
                    "download the model again, or choose one that is supported."
                )
            elif tensor.is_meta:
                # Computed, not stored (rotary frequencies, say): the model's own initialiser knows the values.
                owner = block.get_submodule(name.rpartition(".")[0])
                _set_tensor(block, name, torch.empty_like(tensor, device=device))
                self.model._init_weights(owner)
        return block.eval()

    def release_block(self, index: int) -> None:
        """Give the block's memory back."""
        self._blocks[index].to("meta")

    def meta_block(self, index: int) -> nn.Module:
        """The block as it stands, without memory unless it is loaded."""
        return self._blocks[index]

    def keys_outside_blocks(self) -> list[str]:
        """File keys that belong to no block, in the files' order."""
        owned = {key for name, key in self.keys.items() if self._owner(name) is not None}
        return [key for key in self.files if key not in owned]

    def file_names(self, index: int, quantized: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """What the files call the block, and the tensors of it that quantization leaves as they are, by file key.

        quantized: tensors by name within the block; a linear's `weight` is replaced when its `weight_packed` is among
        them.
        The first such linear gets a guard: an empty tensor in the place of its weight, at which a loader without this
        package stops (shape mismatch) instead of going on with random weights.
        """
        prefix = self.block_names[index]
        rest: dict[str, Tensor] = {}
        file_prefix = ""
        for name, key in self.keys.items():
            if self._owner(name) != index:
                continue
            local = name.removeprefix(f"{prefix}.")
            file_prefix = key.removesuffix(f".{local}")
            if f"{local}_packed" not in quantized:
                rest[key] = self.files.read(key)
        if index == 0:  # every block of a supported model has linears, see pipeline
            first = next(name for name in quantized if name.endswith(".weight_packed"))
            rest[f"{file_prefix}.{first.removesuffix('_packed')}"] = torch.zeros(0)
        return file_prefix, rest

    def unowned_weights(self, index: int) -> list[tuple[str, str]]:
        """(name, remark) of a block's matrices that are no linear layer's (fused experts, convolutions): they stay as
        they are."""
        owned = {
            f"{name}.weight" for name, module in self._blocks[index].named_modules() if isinstance(module, nn.Linear)
        }
        prefix = self.block_names[index]
        return [
            (f"{prefix}.{name}", f"no linear layer, {list(parameter.shape)}: left in full precision")
            for name, parameter in self._blocks[index].named_parameters()
            if parameter.ndim >= 2 and name not in owned
        ]

    def unquantized_linears(self, groups: Iterable[Iterable[str]]) -> list[str]:
        """Names of linears that stay in full precision, as a model's own names, blocks' and others'."""
        quantized = {name for group in groups for name in group}
        inside = [
            f"{prefix}.{name}"
            for prefix, block in zip(self.block_names, self._blocks, strict=True)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        outside = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in [*outside, *inside] if name not in quantized]

    def _owner(self, name: str) -> int | None:
        """Index of the block that a tensor belongs to."""
        head, _, rest = name.partition(f"{self.block_names[0].rpartition('.')[0]}.")
        if head or not rest:
            return None
        return int(rest.partition(".")[0])

    def block_bytes(self) -> int:
        """Bytes of the largest block in the compute dtype."""
        sizes = [sum(p.numel() for p in block.parameters()) for block in self._blocks]
        return max(sizes) * self.dtype.itemsize


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def decoder_blocks(model: PreTrainedModel) -> str:
    """Name of the list of decoder blocks: the largest `ModuleList` of the language model. Raises `QuantExpertsError` if
    none."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise QuantExpertsError(
            f"{type(model).__name__} has no list of decoder blocks: this architecture is not supported."
        )
    return str(max(sizes, key=lambda name: sizes[name]))


def load_skeleton(
    folder: Path, model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, pause: Pause
) -> Skeleton:
    """Load everything but the decoder blocks of a model, on the CPU."""
    found: dict[str, Any] = {}

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        found["names"] = dict(self.state_dict())
        list_name = decoder_blocks(self)
        blocks = self.get_submodule(list_name)
        assert isinstance(blocks, nn.ModuleList)
        found["blocks"] = {f"{list_name}.{i}": block for i, block in enumerate(blocks)}
        for index, block in enumerate(list(blocks)):
            blocks[index] = PausingBlock(index, block, pause)

    # A subclass, so that transformers does all the rest as for any model: names, conversions, computed buffers, tied
    # weights.
    skeleton_class = type(
        model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__}
    )
    model = load_weights(skeleton_class, folder, dtype, config=config)
    files = TensorFiles(folder)
    names, blocks = found["names"], found["blocks"]
    keys = module_names(model, list(files), names)
    return Skeleton(model.eval(), list(blocks), files, keys, dtype, list(blocks.values()))
