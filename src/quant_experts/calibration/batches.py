"""Turns samples into what the model takes: one unpadded sequence each, with a modality for every token.

Sequences are not padded and not joined, so a batch is exactly what the model would see in use. Where the answer begins
is found by comparing token ids with and without it, never by searching for a template's marker, so any chat template
works.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from quant_experts.artifacts import CalibrationBatch, Event, Modality, Sample
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.loading import model_class
from quant_experts.runtime.processor import find_tokenizer, takes_images

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
"""Attributes under which model configurations, then processors, name the placeholder of image features."""


def make_batches(
    samples: Sequence[Sample], processor: Any, config: Any, *, max_tokens: int = 2048
) -> tuple[list[CalibrationBatch], list[Event]]:
    """One `CalibrationBatch` per sample, in order, and an event for each sample that was cut or dropped.

    Args:
        samples: from `load_samples`.
        processor: from `load_processor`: a processor, or the tokenizer of a text-only model.
        config: the model's transformers configuration.
        max_tokens: a longer sequence loses its end; if that would take image tokens, the sample is dropped.

    Raises:
        QuantExpertsError: images for a model that takes text only, a sample that the processor refuses, or no batch
            left.
    """
    if max_tokens < 1:
        raise QuantExpertsError(f"max_tokens is {max_tokens}: allow at least one token per sample.")
    accepted = set(inspect.signature(model_class(config).forward).parameters)
    image_ids = _image_token_ids(config, processor)
    batches: list[CalibrationBatch] = []
    events: list[Event] = []
    for number, sample in enumerate(samples, start=1):
        where = sample.where or f"sample {number}"
        inputs, answer_start = _encode(sample, processor, where)
        inputs = {key: value for key, value in inputs.items() if key in accepted}
        batch = _label(inputs, answer_start, image_ids, find_tokenizer(processor).eos_token_id)
        if sample.images and not bool((batch.modality == Modality.IMAGE).any()):
            raise QuantExpertsError(
                f"{where} has images but the chat template placed none: use the model's own template."
            )
        length = len(batch.modality)
        if length > max_tokens:
            if bool((batch.modality[max_tokens:] == Modality.IMAGE).any()):
                events.append(
                    Event(where, f"dropped: its images do not fit, {length} tokens with a limit of {max_tokens}")
                )
                continue
            batch = _cut(batch, max_tokens)
            events.append(Event(where, f"cut from {length} tokens to the limit of {max_tokens}"))
        batches.append(batch)
    if not batches:
        raise QuantExpertsError(
            f"None of {len(samples)} samples fits into {max_tokens} tokens: allow more tokens or use smaller images."
            if samples
            else "There are no samples to calibrate with: give at least one image with its text."
        )
    if takes_images(processor) and not any(sample.images for sample in samples):
        events.append(
            Event("samples", "none has an image although the model takes images: image tokens were not measured at all")
        )
    return batches, events


def count_tokens(batches: Sequence[CalibrationBatch]) -> dict[str, int]:
    """Number of tokens by modality name in lower case: {"text": ..., "image": ..., "answer": ...}."""
    return {m.name.lower(): sum(int((batch.modality == m).sum()) for batch in batches) for m in Modality}


def render_prompt(processor: Any, question: str, images: int = 0, answer: str | None = None) -> str:
    """The text of one exchange, an image placeholder for each of `images`, through the model's chat template.

    With an answer: the whole exchange, the answer as the assistant's turn. Without: up to where the model begins to
    answer. A model without a chat template gets the question and the answer on a line each.
    """
    # Older checkpoints keep the template with the tokenizer.
    owners = processor, find_tokenizer(processor)
    template = next((owner.chat_template for owner in owners if getattr(owner, "chat_template", None)), None)
    if template is None:
        placeholders = str(getattr(processor, "image_token", "")) * images
        return f"{placeholders}{question}\n{answer or ''}"
    messages = _messages(processor, question, images, answer)
    text = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=answer is None, tokenize=False
    )
    return str(text)


def _messages(processor: Any, question: str, images: int, answer: str | None) -> list[dict[str, Any]]:
    def content(text: str, count: int = 0) -> Any:
        # Templates of text-only models join strings; those of vision-language models walk over typed parts.
        parts = [{"type": "image"}] * count + [{"type": "text", "text": text}]
        return parts if takes_images(processor) else text

    messages = [{"role": "user", "content": content(question, images)}]
    if answer is not None:
        messages.append({"role": "assistant", "content": content(answer)})
    return messages


def _encode(sample: Sample, processor: Any, where: str) -> tuple[dict[str, Tensor], int]:
    """(processor output, index of the first answer token) of one sample."""
    if sample.images and not takes_images(processor):
        raise QuantExpertsError(f"{where} has an image but the model takes text only: use samples without images.")
    try:
        prompt = render_prompt(processor, sample.question, len(sample.images))
        text = render_prompt(processor, sample.question, len(sample.images), sample.answer) if sample.answer else prompt
        inputs = _process(processor, text, sample)
        # Placeholders grow into many tokens, all of them before the answer, so the answer has as many tokens as
        # without images.
        tokenizer = find_tokenizer(processor)
        ids, prompt_ids = tokenizer(text)["input_ids"], tokenizer(prompt)["input_ids"]
        answer_tokens = len(ids) - _common_prefix(ids, prompt_ids)
        whole = inputs["input_ids"][0].tolist()
        if ids[len(ids) - answer_tokens :] == whole[len(whole) - answer_tokens :]:
            return inputs, len(whole) - answer_tokens
        # A processor that rewrites text beyond its placeholders: compare what it makes of both.
        return inputs, _common_prefix(whole, _process(processor, prompt, sample)["input_ids"][0].tolist())
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, StopIteration, TemplateError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise QuantExpertsError(
            f"{where} is refused by the model's processor ({reason}): correct or leave out the sample."
        ) from error


def _process(processor: Any, text: str, sample: Sample) -> dict[str, Tensor]:
    # Nested, one list a sample: LLaVA-OneVision treats several images of one sample otherwise than several samples'
    # images.
    images = {"images": [list(sample.images)]} if sample.images else {}
    return dict(processor(text=[text], return_tensors="pt", **images))


def _label(inputs: dict[str, Tensor], answer_start: int, image_ids: set[int], end_id: int | None) -> CalibrationBatch:
    ids = inputs["input_ids"][0]
    modality = torch.full(ids.shape, Modality.TEXT, dtype=torch.int8)
    # A template may go on after the answer's end token, which the model never generates: that is not the answer.
    ends = (ids[answer_start:] == end_id).nonzero()[:, 0] if end_id is not None else ids[:0]
    answer_end = answer_start + int(ends[-1]) + 1 if len(ends) else len(ids)
    modality[answer_start:answer_end] = Modality.ANSWER
    for image_id in image_ids:
        modality[ids == image_id] = Modality.IMAGE
    return CalibrationBatch(inputs, modality)


def _cut(batch: CalibrationBatch, length: int) -> CalibrationBatch:
    """The first `length` tokens; tensors that are not (1, T) belong to images and stay."""
    shape = batch.inputs["input_ids"].shape
    inputs = {key: value[:, :length] if value.shape == shape else value for key, value in batch.inputs.items()}
    return CalibrationBatch(inputs, batch.modality[:length])


def _image_token_ids(config: Any, processor: Any) -> set[int]:
    found = (getattr(owner, name, None) for owner in (config, processor) for name in IMAGE_TOKEN_NAMES)
    return {value for value in found if isinstance(value, int)}


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
