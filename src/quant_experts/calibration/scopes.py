"""Finds the modules that a scope names, by structure and without a line for any one model.

language: the decoder's blocks. vision: the blocks of the image encoder. merger: what stands between the two, in most
models one or two linears that turn the encoder's output into the language model's tokens. All else (embeddings, head,
patch embedding, encoders of other modalities) belongs to no scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_experts.config import Scope
from quant_experts.errors import QuantExpertsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called: their members are."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, adds its bias, and does nothing else. Of some families routers are
    linears that choose as well, and those of others only write the same product another way: they are tried."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 8, generator=generator) for rows in (4, 3))
    bias = None if module.bias is None else torch.randn(4, generator=generator)
    small = copy(module)
    small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    try:
        y = type(module).forward(small, x)
    except Exception:  # whatever it asks for, a linear does not
        return False
    return isinstance(y, Tensor) and torch.allclose(y, functional.linear(x, weight, bias), atol=1e-5)


def scope_modules(model: PreTrainedModel, scope: Scope) -> list[str]:
    """Names of a scope's modules in the order of registration, each to be quantized as one block.

    Raises `QuantExpertsError` if the model has nothing of the kind.
    """
    return _FINDERS[scope](model)


def decoder_blocks(model: PreTrainedModel) -> str:
    """Name of the list of decoder blocks: the largest `ModuleList` of the language model. Raises `QuantExpertsError` if
    none."""
    decoder = cast(nn.Module, model.get_decoder())
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in decoder.named_modules(prefix=_name_of(model, decoder))
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise QuantExpertsError(
            f"{type(model).__name__} has no list of decoder blocks: this architecture is not supported."
        )
    return str(max(sizes, key=lambda name: sizes[name]))


def image_encoder(model: PreTrainedModel) -> nn.Module | None:
    """The vision encoder as `transformers` knows it; in some families it holds the merger too. None if there is
    none."""
    encoder = model.get_encoder(modality="image")
    return None if encoder is model or encoder is model.base_model else cast(nn.Module, encoder)


def encoder_blocks(model: PreTrainedModel, scope: Scope = "vision") -> str:
    """Name of the list of vision blocks: the longest `ModuleList` of the image encoder with linears. Raises
    `QuantExpertsError`, which names the scope that needs it, if there is none."""
    encoder = image_encoder(model)
    if encoder is None:
        raise QuantExpertsError(
            f"{type(model).__name__} has no vision encoder that transformers names: leave the scope '{scope}' out."
        )
    lists = dict(_outermost_lists(encoder, _name_of(model, encoder)))
    if not lists:
        raise QuantExpertsError(
            f"The vision encoder of {type(model).__name__} has no list of blocks with linear layers: leave the scope "
            f"'{scope}' out."
        )
    return str(max(lists, key=lambda name: len(lists[name])))


def _outermost_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules with linears that are in no other list (in a tower of stages the stages are the blocks)."""
    if not isinstance(module, nn.ModuleList):
        for child_name, child in module.named_children():
            yield from _outermost_lists(child, f"{name}.{child_name}")
    elif _holds(module, is_linear):
        yield name, module


def _merger_modules(model: PreTrainedModel) -> list[str]:
    """The outermost modules with linears that hold neither vision blocks nor language model nor head.

    Left out are those that are registered before the vision blocks, since they feed them (a linear patch embedding),
    and linears by themselves, which are no module with linears in it.
    """
    vision = model.get_submodule(encoder_blocks(model, "merger"))
    elsewhere = {vision, model.get_decoder(), model.get_output_embeddings()}
    found: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        if module is vision:
            found.clear()
        if module in elsewhere:
            return
        if isinstance(module, CONTAINERS) or _holds(module, lambda part: part in elsewhere):
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}".removeprefix("."), child)
        elif not is_linear(module) and _holds(module, is_linear):
            found.append(name)

    visit("", model)
    if not found:
        raise QuantExpertsError(
            f"{type(model).__name__} has no module with linear layers between vision encoder and language model: leave "
            "the scope 'merger' out."
        )
    return found


def _members(model: nn.Module, list_name: str) -> list[str]:
    return [f"{list_name}.{name}" for name, _ in model.get_submodule(list_name).named_children()]


_FINDERS: dict[Scope, Callable[[PreTrainedModel], list[str]]] = {
    "vision": lambda model: _members(model, encoder_blocks(model)),
    "merger": _merger_modules,
    "language": lambda model: _members(model, decoder_blocks(model)),
}


def _holds(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> bool:
    return any(wanted(part) for part in module.modules())


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))
