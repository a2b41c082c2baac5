"""Batched answers equal those to one question at a time, in order, for every family and mixed input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VISION_FAMILIES, build_tiny, tiny_image
from transformers import AutoConfig

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.runtime.loading import model_class
from quant_experts.runtime.processor import find_tokenizer, load_processor

# The InternVL processor of transformers 5.17 gives NumPy a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


def open_tiny(folder: Path) -> tuple[Any, Any]:
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder), load_processor(folder)


def items(family: str) -> list[EvaluationItem]:
    if family not in VISION_FAMILIES:
        return [EvaluationItem("why? " * count, ("so",)) for count in (4, 1, 3)]
    pictures = [tiny_image(90 + 25 * index, 70, index) for index in range(3)]
    return [
        EvaluationItem("a long question? " * 3, ("x",), (pictures[0],)),
        EvaluationItem("2 + 2?", ("4",)),
        EvaluationItem("compare", ("same",), (pictures[1], pictures[0])),
        EvaluationItem("one more, without any image?", ("x",)),
        EvaluationItem("short", ("x",), (pictures[2],)),
    ]


def naive_answer(model: Any, processor: Any, item: EvaluationItem) -> str:
    """Greedy decoding without a cache: the whole sequence again for each token."""
    tokenizer = find_tokenizer(processor)
    parts: Any = [{"type": "image"}] * len(item.images) + [{"type": "text", "text": item.question}]
    messages = [{"role": "user", "content": item.question if processor is tokenizer else parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = {"images": [list(item.images)]} if item.images else {}
    inputs = dict(processor(text=[text], return_tensors="pt", **images))
    answer: list[int] = []
    while len(answer) < 3:
        token = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
        for key, value in {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}.items():
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], dim=1)
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_equals_naive_decoding(family: str, tmp_path: Path) -> None:
    model, processor = open_tiny(build_tiny(family, tmp_path))
    asked = items(family)
    seen: list[tuple[int, int]] = []
    answers = generate_answers(
        model, processor, asked, batch_size=2, max_new_tokens=3, progress=lambda done, total: seen.append((done, total))
    )
    assert answers == [naive_answer(model, processor, item) for item in asked]
    assert len(set(answers)) > 1 and seen[-1] == (len(asked), len(asked))
    # A model that keeps position offsets between calls must not carry them over.
    assert generate_answers(model, processor, asked[::-1], batch_size=3, max_new_tokens=3) == answers[::-1]


def test_sampling_settings_of_the_checkpoint_are_ignored(tmp_path: Path) -> None:
    model, processor = open_tiny(build_tiny("qwen2", tmp_path))
    expected = generate_answers(model, processor, items("qwen2"), max_new_tokens=5)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    assert generate_answers(model, processor, items("qwen2"), max_new_tokens=5) == expected


def test_mode_and_tokenizer_are_left_as_found(tmp_path: Path) -> None:
    model, processor = open_tiny(build_tiny("qwen2", tmp_path))
    model.train()
    processor.padding_side = "right"
    assert generate_answers(model, processor, items("qwen2"), max_new_tokens=2)
    assert model.training and processor.padding_side == "right"


def test_bad_input(tmp_path: Path) -> None:
    model, processor = open_tiny(build_tiny("qwen2", tmp_path, layers=1))
    with pytest.raises(QuantExpertsError, match="takes text only"):
        generate_answers(model, processor, items("qwen2_vl"))
    with pytest.raises(QuantExpertsError, match="at least 1"):
        generate_answers(model, processor, items("qwen2"), batch_size=0)
    assert generate_answers(model, processor, []) == []
