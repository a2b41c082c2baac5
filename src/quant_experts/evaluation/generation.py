"""Asks a model questions and returns its greedy answers, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quant_experts.calibration.batches import render_prompt
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.runtime.processor import find_tokenizer, takes_images


def generate_answers(
    model: Any,
    processor: Any,
    items: Sequence[EvaluationItem],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One greedy answer per item, in the order of `items`, white space stripped at both ends.

    Batches are padded on the left and hold questions of similar length, and either all or none of them have images:
    not every processor takes both at once. What the batch size changes is rounding only.

    Args:
        model: a transformers model that generates, on any device.
        processor: from `load_processor`.
        progress: called with (answered, total) after each batch.

    Raises:
        QuantExpertsError: a question has an image but the model takes text only.
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise QuantExpertsError(f"{name} is {number}: it must be at least 1.")
    if not takes_images(processor) and any(item.images for item in items):
        raise QuantExpertsError("A question has an image but the model takes text only: ask questions without images.")
    answers = [""] * len(items)
    done = 0
    with _evaluating(model):
        for group in _similar(items, batch_size):
            inputs = _padded([items[index] for index in group], processor)
            for index, answer in zip(group, _generate(model, processor, inputs, max_new_tokens), strict=True):
                answers[index] = answer
            done += len(group)
            if progress is not None:
                progress(done, len(items))
    return answers


def to_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """The tensors of a processor's output on the model's device, floating-point ones in its dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _similar(items: Sequence[EvaluationItem], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, which is pixels, then characters: known without running the processor."""
    for with_images in (False, True):
        indices = [index for index, item in enumerate(items) if bool(item.images) is with_images]
        indices.sort(key=lambda index: (_pixels(items[index]), len(items[index].question)))
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def _pixels(item: EvaluationItem) -> int:
    return sum(image.width * image.height for image in item.images)


def _padded(items: Sequence[EvaluationItem], processor: Any) -> Any:
    texts = [render_prompt(processor, item.question, len(item.images)) for item in items]
    images = {"images": [list(item.images) for item in items]} if items[0].images else {}
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **images)


def _generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    tokenizer = find_tokenizer(processor)
    tensors = to_model({k: v for k, v in inputs.items() if k != "token_type_ids"}, model)
    # The checkpoint's own sampling settings are switched off, so that answers depend on the weights alone.
    output = model.generate(
        **tensors,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    new_tokens = output[:, tensors["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
