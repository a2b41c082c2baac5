"""Streams a model block by block: one block in memory, every sample's forward pass paused in front of it.

Models run code between their blocks (Qwen3-VL adds image features there, others change masks), so blocks are never
chained by hand. Each sample runs the model's own forward pass in a greenlet; when the pass reaches a block, the
greenlet stops there with the block's arguments and the driver goes on with the next sample. Greenlets rather than
threads: one runs at a time, in a fixed order, in one thread, so results repeat bit for bit, errors surface where they
happen and nothing is left running.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quant_experts.artifacts import CalibrationBatch
from quant_experts.calibration.skeleton import Skeleton, load_skeleton
from quant_experts.errors import QuantExpertsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class BlockCall:
    """A sample's forward pass, waiting for a block's output."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockStream:
    """Runs all samples through a model one block at a time.

    for index in stream.blocks():      # samples are paused in front of block `index`
        block = stream.skeleton.load_block(index, device)
        stream.run(block)              # outputs thrown away: watch with hooks
        ... change the block ...
        stream.advance(block)          # outputs become the next block's input
    """

    def __init__(
        self,
        folder: Path,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        batches: Sequence[CalibrationBatch],
        device: torch.device,
        dtype: torch.dtype,
        *,
        differentiable: bool = False,
        skeleton: Skeleton | None = None,
    ) -> None:
        """differentiable: tensors can take part in a graph, and what the model runs between blocks is recorded in one
        (`resume`); else passes run in inference mode. skeleton: another stream's, which must not run meanwhile."""
        self.skeleton: Skeleton = skeleton or load_skeleton(folder, model_class, config, dtype, _pause)
        self.device, self.dtype = device, dtype
        self.batches = batches
        self._quiet = torch.no_grad if differentiable else torch.inference_mode
        self._between = torch.enable_grad if differentiable else torch.inference_mode
        self._passes = [greenlet(self._forward) for _ in batches]
        self._calls: list[BlockCall] = []
        self.outputs: list[Any] = [None] * len(batches)
        """Per sample, the model's own output (after `advance(..., finish=True)` on the last block)."""
        self._encoder: nn.Module | None = None
        self.width: int = config.get_text_config().hidden_size
        """Hidden size of the blocks."""
        self.vocabulary: int = config.get_text_config().vocab_size
        """Logits of one token."""
        if device.type != "cpu":
            self._encoder = _run_encoder_on(self.skeleton.model, device)

    def _forward(self, batch: CalibrationBatch) -> Any:
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        return self.skeleton.model(**inputs, use_cache=False)

    def blocks(self) -> Iterator[int]:
        """Block indices in order, with every sample paused in front of that block. Call `advance` before asking for the
        next."""
        try:
            if self._encoder is not None:
                self._encoder.to(self.device)
            with self._quiet():
                self._calls = [one.switch(batch) for one, batch in zip(self._passes, self.batches, strict=True)]
            if self._encoder is not None:
                self._encoder.to("cpu")  # all samples are past it
            for index in range(len(self.skeleton.block_names)):
                if any(not isinstance(call, BlockCall) or call.index != index for call in self._calls):
                    raise QuantExpertsError(
                        f"The model does not run its blocks once each and in order (at block {index}): it is not "
                        f"supported."
                    )
                yield index
        finally:
            self.close()

    def run(self, block: nn.Module) -> Iterator[int]:
        """Run each sample through the block in turn, yielding its index after each; outputs are dropped."""
        for i, call in enumerate(self._calls):
            with self._quiet():
                self.call_block(block, call)
            yield i

    def advance(self, block: nn.Module, *, finish: bool = False) -> None:
        """Run each sample through the block and on to the next one.

        After the last block the passes end there, or, with `finish`, go on to the model's output, kept in `outputs`.
        """
        last = self._calls[0].index == len(self.skeleton.block_names) - 1
        if last and not finish:
            return
        for i, call in enumerate(self._calls):
            with self._quiet():
                output = to_device(self.call_block(block, call), torch.device("cpu"))
            result = self.resume(i, output)
            if last:
                self.outputs[i] = result

    def call_block(self, block: nn.Module, call: BlockCall) -> Any:
        """The block's output for a call, both on the device."""
        return block(*to_device(call.args, self.device), **to_device(call.kwargs, self.device))

    def resume(self, sample: int, output: Any) -> Any:
        """Give a sample its block's output, on the host. -> its call of the next block, or the model's own output."""
        with self._between():
            result = self._passes[sample].switch(output)
        if isinstance(result, BlockCall):
            self._calls[sample] = result
        return result

    @property
    def calls(self) -> Sequence[BlockCall]:
        """What each sample waits for."""
        return self._calls

    @property
    def index(self) -> int:
        """The block that all samples are paused in front of."""
        return self._calls[0].index

    def close(self) -> None:
        """End passes that are still waiting."""
        for one in self._passes:
            if one and not one.dead:
                one.throw(GreenletExit)


def _run_encoder_on(model: PreTrainedModel, device: torch.device) -> nn.Module | None:
    """Run the vision encoder, which is returned if there is one, on the device; its inputs and outputs stay on the host
    like all else between blocks."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    encoder = model.get_encoder(modality="image")
    if encoder is model or encoder is model.base_model:
        return None
    encoder.to(device)
    add_hook_to_module(encoder, AlignDevicesHook(execution_device=device, io_same_device=True))
    return cast(nn.Module, encoder)


def _pause(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand a block's arguments to the driver and wait for its output."""
    driver = getcurrent().parent
    if driver is None:
        raise QuantExpertsError("This model was loaded for calibration without its blocks: it cannot run by itself.")
    return driver.switch(BlockCall(index, args, kwargs))


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nested structure."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def hidden_state(value: Any) -> Tensor:
    """Of a nested structure the first tensor with a gradient, or else the first floating-point one."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return next((tensor for tensor in tensors if tensor.requires_grad), tensors[0])
