"""Training batches rendered by many processes, ahead of the accelerator.

A batch is ``turns`` questions of each kind; rows with a picture come first. Workers write whole batches into anonymous
shared memory (pickling pictures through a queue costs more than rendering them), and a thread copies finished batches
to the device through pinned memory. When rendering falls behind, a random recent batch is trained on again: an
accelerator that waits is the greater waste.
"""

import mmap
import multiprocessing
import random
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quant_experts.demo.architecture import prompt
from quant_experts.demo.questions import KINDS, Question, Split, question
from quant_experts.demo.rendering import SIDE

LENGTH = 112  # tokens of a row, padding included
IGNORED = -100

_PICTURES = len(KINDS) - 1  # rows with a picture, of each turn: all kinds but `text`


@dataclass(frozen=True)
class Batch:
    """``tokens`` (B, T), ``targets`` (B, T) with the next token where that is part of an answer, else ``IGNORED``, both
    int64; ``images`` (P, SIDE, SIDE, 3) uint8 of the first P rows."""

    tokens: Tensor
    targets: Tensor
    images: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.images.to(device))


def encode(tokenizer: PreTrainedTokenizerFast, asked: Question) -> tuple[list[int], int]:
    """The tokens of prompt, answer and end of turn, and how many of them the prompt has."""
    before = tokenizer.encode(prompt(asked.question, image=asked.image is not None))
    return before + tokenizer.encode(asked.answer + "<|im_end|>"), len(before)


def _fill(asked: Question, tokenizer: PreTrainedTokenizerFast, tokens: Any, targets: Any, image: Any) -> None:
    """Write one question to its row of the arrays."""
    ids, start = encode(tokenizer, asked)
    tokens[:] = tokenizer.pad_token_id
    tokens[: len(ids)] = ids
    targets[:] = IGNORED
    targets[start - 1 : len(ids) - 1] = ids[start:]
    if asked.image is not None:
        image[:] = np.frombuffer(asked.image.tobytes(), np.uint8).reshape(image.shape)


def row_of(index: int, turns: int) -> int:
    """The row of a batch that its question ``index`` takes: pictures first, then the questions without one."""
    turn, kind = divmod(index, len(KINDS))
    return turn * _PICTURES + kind if kind < _PICTURES else turns * _PICTURES + turn


def batch_of(tokenizer: PreTrainedTokenizerFast, split: Split, start: int, turns: int) -> Batch:
    """The batch of questions ``start`` (a multiple of the number of kinds) and on, rendered here and now."""
    tokens, targets, images = _arrays(bytearray(_slot_bytes(turns)), turns)
    _render(tokenizer, split, start, turns, (tokens, targets, images))
    return Batch(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long(), torch.from_numpy(images))


def _render(tokenizer: PreTrainedTokenizerFast, split: Split, start: int, turns: int, arrays: Any) -> None:
    tokens, targets, images = arrays
    for index in range(turns * len(KINDS)):
        row = row_of(index, turns)
        image = images[row] if row < len(images) else None
        _fill(question(split, start + index), tokenizer, tokens[row], targets[row], image)


def _slot_bytes(turns: int) -> int:
    return turns * (2 * 2 * LENGTH * len(KINDS) + SIDE * SIDE * 3 * _PICTURES)


def _arrays(memory: Any, turns: int) -> tuple[Any, Any, Any]:
    """Views of one slot: tokens and targets (B, T) int16, images (P, SIDE, SIDE, 3) uint8."""
    rows, pictures = turns * len(KINDS), turns * _PICTURES
    words = np.frombuffer(memory, np.int16, 2 * rows * LENGTH).reshape(2, rows, LENGTH)
    images = np.frombuffer(memory, np.uint8, pictures * SIDE * SIDE * 3, offset=4 * rows * LENGTH)
    return words[0], words[1], images.reshape(pictures, SIDE, SIDE, 3)


def _work(tokenizer: PreTrainedTokenizerFast, slots: list[Any], turns: int, todo: Any, done: Any) -> None:
    """Render batches named by (slot, first question) until told to stop."""
    while (job := todo.get()) is not None:
        slot, start = job
        _render(tokenizer, "train", start, turns, _arrays(slots[slot], turns))
        done.put(slot)


class Stream:
    """An endless iterator over training batches on ``device``; create it before the device is first used (it forks)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, turns: int, workers: int, first: int) -> None:
        """Start ``workers`` processes on batches of ``turns`` questions a kind, from batch ``first`` on."""
        self._turns = turns
        self._next = first
        self._slots = [mmap.mmap(-1, _slot_bytes(turns)) for _ in range(2 * workers + 4)]
        context = multiprocessing.get_context("fork")
        self._todo: Any = context.Queue()
        self._done: Any = context.Queue()
        self._ready: Queue[Batch] = Queue(maxsize=4)
        arguments = (tokenizer, self._slots, turns, self._todo, self._done)
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()
        for slot in range(len(self._slots)):
            self._order(slot)
        self.fresh = 0
        self.replayed = 0

    def _order(self, slot: int) -> None:
        """Have the next batch rendered into ``slot``."""
        self._todo.put((slot, self._next * self._turns * len(KINDS)))
        self._next += 1

    def _copy(self, device: torch.device) -> None:
        """Move finished batches to the device and their slots back into use, for ever."""
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        while True:
            slot = self._done.get()
            tokens, targets, images = (torch.from_numpy(array) for array in _arrays(self._slots[slot], self._turns))
            if side is None:
                batch = Batch(tokens.long(), targets.long(), images.clone())
            else:
                with torch.cuda.stream(side):
                    pinned = images.pin_memory()
                    batch = Batch(tokens.to(device).long(), targets.to(device).long(), pinned.to(device))
                side.synchronize()
                for part in (batch.tokens, batch.targets, batch.images):
                    part.record_stream(torch.cuda.default_stream(device))
            self._order(slot)
            self._ready.put(batch)

    def batches(self, device: torch.device, remembered: int = 256) -> Iterator[Batch]:
        """Yield batches; of the last ``remembered`` one comes again whenever no new one is ready."""
        threading.Thread(target=self._copy, args=(device,), daemon=True).start()
        memory: deque[Batch] = deque(maxlen=remembered)
        rng = random.Random(self._next)
        while True:
            try:
                batch = self._ready.get(block=len(memory) < 32)
                memory.append(batch)
                self.fresh += 1
            except Empty:
                batch = rng.choice(memory)
                self.replayed += 1
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.terminate()
