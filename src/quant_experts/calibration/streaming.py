"""Streams a model block by block: one block in memory, every sample's forward pass paused in front of it.

Models run code between their blocks (Qwen3-VL adds image features there, others change masks), so blocks are never
chained by hand. Each sample runs the model's own forward pass in a greenlet; when the pass reaches a block, the
greenlet stops there with the block's arguments and the driver goes on with the next sample. Greenlets rather than
threads: one runs at a time, in a fixed order, in one thread, so results repeat bit for bit, errors surface where they
happen and nothing is left running.

Blocks come in the order in which one sample, the leader, calls them: not every order is that of registration (Qwen3-VL
calls some mergers between its vision blocks). The leader is the first of the samples that start earliest, so one with
an image where vision blocks are streamed; samples without an image wait until it comes to the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quant_experts.artifacts import CalibrationBatch, Modality
from quant_experts.calibration.scopes import CONTAINERS, image_encoder
from quant_experts.calibration.skeleton import PausingBlock, Skeleton, load_skeleton
from quant_experts.config import DEFAULT_SCOPES, Scope
from quant_experts.errors import QuantExpertsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


HOST = torch.device("cpu")


@dataclass
class BlockCall:
    """A sample's forward pass, waiting for a block's output."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockStream:
    """Runs all samples through a model one block at a time.

    for index in stream.blocks():      # the samples `stream.waiting` are paused in front of block `index`
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
        scopes: Sequence[Scope] = DEFAULT_SCOPES,
        differentiable: bool = False,
        skeleton: Skeleton | None = None,
    ) -> None:
        """scopes: whose blocks are streamed. differentiable: tensors can take part in a graph, and what the model runs
        between the language model's blocks is recorded in one (`resume`); else passes run in inference mode. skeleton:
        another stream's of the same scopes, which must not run meanwhile.

        Raises `QuantExpertsError` as `load_skeleton` does.
        """
        self.skeleton: Skeleton = skeleton or load_skeleton(folder, model_class, config, dtype, _pause, scopes)
        self.device, self.dtype = device, dtype
        self.batches = batches
        self._quiet = torch.no_grad if differentiable else torch.inference_mode
        self._between = torch.enable_grad if differentiable else torch.inference_mode
        self._passes = [greenlet(self._forward) for _ in batches]
        self._calls: list[BlockCall | None] = [None] * len(batches)
        """What each sample waits for; None before the start and after the end."""
        self.outputs: list[Any] = [None] * len(batches)
        """Per sample, the model's own output (after `advance(..., finish=True)` on the last block)."""
        self.index = 0
        """The block whose turn it is."""
        self.never_run: list[int] = []
        """After the last block: those that no sample came to."""
        self.width: int = config.get_text_config().hidden_size
        """Hidden size of the language model's blocks."""
        self.vocabulary: int = config.get_text_config().vocab_size
        """Logits of one token."""
        self._encoder = [] if device.type == "cpu" else _hook_encoder(self.skeleton.model, device)

    def _forward(self, batch: CalibrationBatch) -> Any:
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        return self.skeleton.model(**inputs, use_cache=False)

    def blocks(self) -> Iterator[int]:
        """Indices of blocks in the order in which they run, with samples paused in front of that block. Call `advance`
        before asking for the next.

        Raises `QuantExpertsError` if the model does not run each block once for each sample, or no sample comes to any
        block of a scope.
        """
        done: list[int] = []
        count = len(self.skeleton.blocks)
        try:
            with self._encoder_at_work(), self._quiet():
                for i, batch in enumerate(self.batches):
                    self._receive(i, self._passes[i].switch(batch))
            leader = min(range(len(self.batches)), key=self._place)
            while (index := self._next(leader)) < count:
                self._check_order(done)
                self.index = index
                if self.scope == "language":
                    self._check_scopes(done)
                yield index
                done.append(index)
            self._check_scopes(done)
            self.never_run = [i for i in range(count) if i not in done]
            self._check_order(range(count))
        finally:
            self.close()

    def _place(self, sample: int) -> int:
        """The block that a sample waits for; the number after the last where it has passed all."""
        call = self._calls[sample]
        return len(self.skeleton.blocks) if call is None else call.index

    def _next(self, leader: int) -> int:
        """The block that comes next, the number after the last where there is none. The language model's are run in
        their order, though not by all samples (cross-attention is for those with images); others in the leader's."""
        place = self._place(leader)
        if place < len(self.skeleton.blocks) and self._scope(place) != "language":
            return place
        before = sum(block.scope != "language" for block in self.skeleton.blocks)
        return min(place for place in map(self._place, range(len(self.batches))) if place >= before)

    def _scope(self, index: int) -> Scope:
        return self.skeleton.blocks[index].scope

    def _check_order(self, passed: Sequence[int]) -> None:
        """No sample may come to a block after the leader has passed it, and none of the language model's may be left
        out."""
        missed = [i for i in self.never_run if self._scope(i) == "language"]
        if missed:
            raise QuantExpertsError(
                f"No sample ran through '{self.skeleton.block_names[missed[0]]}': if that block attends to images, "
                "calibrate with samples that have some; if not, the model is not supported."
            )
        late = [place for place in map(self._place, range(len(self.batches))) if place in passed]
        if late:
            raise QuantExpertsError(
                f"The model does not run its blocks once each and in one order for all samples (at block "
                f"'{self.skeleton.block_names[late[0]]}'): it is not supported."
            )

    def _check_scopes(self, done: Sequence[int]) -> None:
        """In front of the language model: did anything run through the scopes before it?"""
        came = {self._scope(index) for index in done}
        for scope in ("vision", "merger"):
            if scope not in came and self.skeleton.names_of(scope):
                raise QuantExpertsError(
                    f"No image ran through the blocks of the scope '{scope}': calibrate with samples that have images, "
                    "or leave the scope out."
                )

    @property
    def scope(self) -> Scope:
        """Of the block whose turn it is."""
        return self._scope(self.index)

    @property
    def waiting(self) -> list[int]:
        """The samples that are paused in front of the block whose turn it is, ascending."""
        return [i for i in range(len(self.batches)) if self._place(i) == self.index]

    def modality(self, sample: int) -> Tensor:
        """(T,) int8 of `Modality`: the tokens that a waiting sample brings to the block. In front of the language model
        they are the image's."""
        if self.scope == "language":
            return self.batches[sample].modality
        state = hidden_state((self.calls[sample].args, self.calls[sample].kwargs))
        return torch.full((state.shape[:-1].numel(),), Modality.IMAGE, dtype=torch.int8)

    def run(self, block: nn.Module) -> Iterator[int]:
        """Run each waiting sample through the block in turn, yielding its index after each; outputs are dropped."""
        for i in self.waiting:
            with self._quiet():
                self.call_block(block, self.calls[i])
            yield i

    def advance(self, block: nn.Module, *, finish: bool = False) -> None:
        """Run each waiting sample through the block and on to the next one.

        After the language model's last block the passes end there, or, with `finish`, go on to the model's output, kept
        in `outputs`.
        """
        last = self.scope == "language" and self.index == len(self.skeleton.blocks) - 1
        with self._encoder_at_work() if self.scope != "language" else nullcontext():
            for i in self.waiting:
                if last and not finish:
                    self._calls[i] = None
                    continue
                with self._quiet():
                    output = to_device(self.call_block(block, self.calls[i]), HOST)
                result = self.resume(i, output)
                if last:
                    self.outputs[i] = result

    def call_block(self, block: nn.Module, call: BlockCall) -> Any:
        """The block's output for a call, both on the device."""
        return block(*to_device(call.args, self.device), **to_device(call.kwargs, self.device))

    def resume(self, sample: int, output: Any) -> Any:
        """Give a sample its block's output, on the host. -> its call of the next block, or the model's own output."""
        with self._between() if self.scope == "language" else self._quiet():
            return self._receive(sample, self._passes[sample].switch(output))

    def _receive(self, sample: int, result: Any) -> Any:
        """Note what a sample waits for now. -> result, as it is."""
        self._calls[sample] = result if isinstance(result, BlockCall) else None
        return result

    @property
    def calls(self) -> dict[int, BlockCall]:
        """What each sample that is not at its end waits for."""
        return {i: call for i, call in enumerate(self._calls) if call is not None}

    @contextmanager
    def _encoder_at_work(self) -> Iterator[None]:
        """The vision encoder on the device, while samples are on their way through it."""
        for part in self._encoder:
            part.to(self.device)
        yield
        for part in self._encoder:
            part.to(HOST)

    def close(self) -> None:
        """End passes that are still waiting."""
        for one in self._passes:
            if one and not one.dead:
                one.throw(GreenletExit)


def _hook_encoder(model: PreTrainedModel, device: torch.device) -> list[nn.Module]:
    """Let the parts of the vision encoder that hold no block run on the device, with their inputs and outputs on the
    host like all else between blocks. -> these parts, which the caller moves there: the whole encoder where no block is
    in it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    encoder = image_encoder(model)
    parts = [] if encoder is None else list(_parts_without_blocks(encoder))
    for part in parts:
        part.to(device)
        add_hook_to_module(part, AlignDevicesHook(execution_device=device, io_same_device=True))
    return parts


def _parts_without_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that hold no `PausingBlock` and are called (lists are not)."""
    if isinstance(module, CONTAINERS) or any(type(part) is PausingBlock for part in module.modules()):
        for child in module.children():
            yield from _parts_without_blocks(child)
    elif any(True for _ in module.parameters()):
        yield module


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
