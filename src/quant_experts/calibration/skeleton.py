"""A model whose blocks are not there: everything else is loaded by `transformers`, the blocks wait on disk.

Each block's place is taken by a `PausingBlock`, which hands its arguments to whoever drives the forward pass and waits
for the output. The real blocks are kept aside without memory (meta device) and filled one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_experts.calibration.scopes import is_linear, scope_modules
from quant_experts.checkpoint.source import TensorFiles, module_names
from quant_experts.config import DEFAULT_SCOPES, SCOPES, Scope
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.loading import load_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Pause = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Called with a block's index and arguments; returns the block's output."""


class PausingBlock(nn.Module):
    """Stands where a block stood, and answers to the block's attributes (models read some of them between blocks) and
    to its class (`transformers` keeps the outputs of modules of certain classes, from which some families take image
    features)."""

    def __init__(self, index: int, block: nn.Module, pause: Pause) -> None:
        object.__setattr__(self, "_stood_for", block)  # not registered: it has no memory to load
        super().__init__()
        self._index, self._pause = index, pause

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_stood_for"), name)

    @property  # type: ignore[misc]  # read-only: nobody sets it
    def __class__(self) -> type:
        return type(self._stood_for)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the driver returns for this block."""
        return self._pause(self._index, args, kwargs)


@dataclass(frozen=True)
class Block:
    """A module that was taken out of a model."""

    name: str
    scope: Scope
    module: nn.Module


_ANY_VALUE = (torch.bool, torch.uint8)
"""Types of buffers of which no value can stand for none."""
_WHOLE = (*_ANY_VALUE, torch.int8, torch.int16, torch.int32, torch.int64)


def _unset(dtype: torch.dtype) -> float:
    """A value that no initialiser leaves."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype in _ANY_VALUE else torch.iinfo(dtype).min


@dataclass
class Skeleton:
    """A model without its blocks, and what is needed to bring each block in.

    Blocks are numbered in the order of their scopes. The language model's are always taken out, since they are most of
    the model: where that scope is not asked for, a pass ends in front of them, under the number after the last.
    """

    model: PreTrainedModel
    blocks: list[Block]
    """Those that are streamed."""
    files: TensorFiles
    keys: dict[str, str]
    """The model's tensor names -> keys in the files."""
    dtype: torch.dtype
    """Compute dtype."""
    unread: Sequence[Block] = ()
    """Taken out as well, but never read: the language model's where they are no scope of the run."""

    @cached_property
    def block_names(self) -> list[str]:
        """As the model's modules are called."""
        return [block.name for block in self.blocks]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {block.name: index for index, block in enumerate(self.blocks)}

    def names_of(self, scope: Scope) -> list[str]:
        """Names of the blocks of a scope."""
        return [block.name for block in self.blocks if block.scope == scope]

    def check_names(self) -> None:
        """Raises `QuantExpertsError` if the files do not have a parameter of a block: better before work than after."""
        for block in self.blocks:
            for name, _ in block.module.named_parameters():
                if (full := f"{block.name}.{name}") not in self.keys:
                    raise QuantExpertsError(
                        f"Tensor '{full}' is not in the files as the model has it: either files are missing (download "
                        "the model again), or they store it in another form (experts one by one, say), which is not "
                        "supported."
                    )

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """The block with its weights, on a device, in the compute dtype. The caller frees it with `release_block`.

        Raises `QuantExpertsError` if a tensor is damaged or not finite; whether all are there, `check_names` has said.
        """
        block, prefix = self.meta_block(index), self.block_names[index]
        self._compute_buffers(block, prefix, device)  # before weights are there, which initialisers overwrite
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
        return block.eval()

    @torch.no_grad()
    def _compute_buffers(self, block: nn.Module, prefix: str, device: torch.device) -> None:
        """Buffers that are computed, not stored (rotary frequencies, say): the model's own initialiser knows the
        values.

        Raises `QuantExpertsError` for one that the initialiser of its module leaves as it is.
        """
        buffers = [name for name, tensor in block.named_buffers() if tensor.is_meta]
        names = [name for name in buffers if f"{prefix}.{name}" not in self.keys]
        for name in names:
            empty = torch.empty_like(block.get_buffer(name), device=device)
            _set_tensor(block, name, empty.fill_(_unset(empty.dtype)))
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            self.model._init_weights(block.get_submodule(owner))
        for name in names:
            value = block.get_buffer(name)
            unset = value == _unset(value.dtype) if value.dtype in _WHOLE else value.isnan()
            if value.dtype not in _ANY_VALUE and unset.any():
                raise QuantExpertsError(
                    f"'{prefix}.{name}' is neither stored nor computed by its own module: {type(self.model).__name__} "
                    "cannot be brought in block by block, and is not supported."
                )

    def release_block(self, index: int) -> None:
        """Give the block's memory back."""
        self.meta_block(index).to("meta")

    def meta_block(self, index: int) -> nn.Module:
        """The block as it stands, without memory unless it is loaded."""
        return self.blocks[index].module

    def keys_outside_blocks(self) -> list[str]:
        """File keys that belong to no block, in the files' order."""
        owned = {key for name, key in self.keys.items() if self._owner(name) is not None}
        return [key for key in self.files if key not in owned]

    def file_names(
        self, index: int, quantized: Mapping[str, Tensor], *, guard: bool = False
    ) -> tuple[str, dict[str, Tensor]]:
        """What the files call the block, and the tensors of it that quantization leaves as they are, by file key.

        quantized: tensors by name within the block; a linear's `weight` is replaced when its `weight_packed` is among
        them.
        guard: put an empty tensor in the place of the first such linear's weight, at which a loader without this
        package stops (shape mismatch) instead of going on with random weights.
        """
        prefix = self.block_names[index]
        rest: dict[str, Tensor] = {}
        file_prefix = prefix  # loads too, where files call every tensor otherwise than the block does
        for name, key in self.keys.items():
            if self._owner(name) != index:
                continue
            local = name.removeprefix(f"{prefix}.")
            if key.endswith(f".{local}"):
                file_prefix = key.removesuffix(f".{local}")
            if f"{local}_packed" not in quantized:
                rest[key] = self.files.read(key)
        if guard:
            first = next(name for name in quantized if name.endswith(".weight_packed"))
            rest[f"{file_prefix}.{first.removesuffix('_packed')}"] = torch.zeros(0)
        return file_prefix, rest

    def unowned_weights(self, index: int) -> list[tuple[str, str]]:
        """(name, remark) of a block's matrices that are no linear layer's (fused experts, convolutions): they stay as
        they are."""
        block, prefix = self.meta_block(index), self.block_names[index]
        owned = {f"{name}.weight" for name, module in block.named_modules() if is_linear(module)}
        return [
            (f"{prefix}.{name}", f"no linear layer, {list(parameter.shape)}: left in full precision")
            for name, parameter in block.named_parameters()
            if parameter.ndim >= 2 and name not in owned
        ]

    def unquantized_linears(self, groups: Iterable[Iterable[str]]) -> list[str]:
        """Names of linears that stay in full precision, as a model's own names, blocks' and others'."""
        quantized = {name for group in groups for name in group}
        inside = [
            f"{block.name}.{name}"
            for block in (*self.blocks, *self.unread)
            for name, module in block.module.named_modules()
            if isinstance(module, nn.Linear)
        ]
        outside = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in [*outside, *inside] if name not in quantized]

    def _owner(self, name: str) -> int | None:
        """Index of the block that a tensor belongs to."""
        while name:
            name = name.rpartition(".")[0]
            if name in self._numbers:
                return self._numbers[name]
        return None

    def block_bytes(self) -> int:
        """Bytes of the largest block in the compute dtype."""
        sizes = [sum(p.numel() for p in block.module.parameters()) for block in self.blocks]
        return max(sizes) * self.dtype.itemsize


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _take_out(model: PreTrainedModel, scopes: Sequence[Scope], pause: Pause) -> list[Block]:
    """Put a `PausingBlock` in the place of every block of the scopes and of the language model. -> the blocks, those of
    the language model last."""
    wanted = [scope for scope in SCOPES if scope in scopes or scope == "language"]
    names = [(name, scope) for scope in wanted for name in scope_modules(model, scope)]
    blocks = [Block(name, scope, model.get_submodule(name)) for name, scope in names]
    end = sum(block.scope in scopes for block in blocks)
    for index, block in enumerate(blocks):
        model.set_submodule(block.name, PausingBlock(min(index, end), block.module, pause))
    return blocks


def load_skeleton(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    pause: Pause,
    scopes: Sequence[Scope] = DEFAULT_SCOPES,
) -> Skeleton:
    """Load everything of a model but the blocks of the scopes and of the language model, on the CPU.

    Raises `QuantExpertsError` if the model has nothing of a scope, or its files cannot be read.
    """
    found: dict[str, Any] = {}

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        found["names"] = dict(self.state_dict())
        found["blocks"] = _take_out(self, scopes, pause)

    # A subclass, so that transformers does all the rest as for any model: names, conversions, computed buffers, tied
    # weights.
    skeleton_class = type(
        model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__}
    )
    model = load_weights(skeleton_class, folder, dtype, config=config)
    files = TensorFiles(folder)
    keys = module_names(model, list(files), found["names"])
    streamed = [block for block in found["blocks"] if block.scope in scopes]
    unread = [block for block in found["blocks"] if block.scope not in scopes]
    skeleton = Skeleton(model.eval(), streamed, files, keys, dtype, unread)
    skeleton.check_names()
    return skeleton
