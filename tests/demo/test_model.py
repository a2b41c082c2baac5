"""The bundled model loads without a network, is small, and answers the questions it was trained on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from quant_experts.demo import KINDS, Question, model_path, questions
from quant_experts.demo.architecture import build_model, build_tokenizer, prompt, save
from quant_experts.runtime.processor import load_processor

PER_KIND = 16


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32).eval()


def chat(processor: Any, asked: Question) -> str:
    parts = [{"type": "image"}] if asked.image is not None else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": asked.question}]}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def answers(model: Any, processor: Any, asked: list[Question]) -> list[str]:
    images = [one.image for one in asked if one.image is not None]
    inputs = processor(
        text=[chat(processor, one) for one in asked], images=images or None, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model.generate(**inputs)
    return list(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_model_is_small(model: Any) -> None:
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 16e6
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 32e6


def test_its_files_name_no_place() -> None:
    for file in model_path().glob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in text and not re.search(r'[\s"]/\w', text), file.name


def test_the_record_covers_every_kind() -> None:
    record = json.loads((model_path() / "training.json").read_text())
    for scores in record["scores"].values():
        assert set(scores) == {*KINDS, "average"}


def test_the_chat_template_is_the_training_prompt(processor: Any) -> None:
    for asked in questions("tuning", len(KINDS)):
        images = [asked.image] if asked.image is not None else None
        seen = processor(text=[chat(processor, asked)], images=images, return_tensors="pt")["input_ids"][0]
        assert seen.tolist() == processor.tokenizer.encode(prompt(asked.question, image=asked.image is not None))
    plain = processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n"


def test_it_answers_at_least_seven_in_ten_of_each_kind(model: Any, processor: Any) -> None:
    asked = questions("tuning", PER_KIND * len(KINDS))
    for kind in KINDS:
        rows = [one for one in asked if one.kind == kind]
        got = answers(model, processor, rows)
        right = sum(answer == one.answer for answer, one in zip(got, rows, strict=True))
        assert right >= 0.7 * PER_KIND, (kind, list(zip(got, [one.answer for one in rows], strict=True)))


def test_a_padded_batch_gives_the_answers_of_single_questions(model: Any, processor: Any) -> None:
    asked = questions("calibration", len(KINDS))
    assert answers(model, processor, asked) == [answers(model, processor, [one])[0] for one in asked]


def test_a_saved_model_loads_again(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    saved = build_model(
        tokenizer, 0, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    save(saved, tokenizer, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    state = loaded.state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(value.bfloat16().float(), state[name]), name
    assert load_processor(tmp_path).tokenizer.padding_side == "left"
