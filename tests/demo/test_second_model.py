"""The second trained model, beside the package: it loads without a network, is small, and answers what its record says
it learned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from quant_experts.demo import KINDS, Question, questions
from quant_experts.runtime.processor import load_processor

FOLDER = Path(__file__).parents[2] / "benchmarks" / "second_model"
PER_KIND = 6

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="source distributions leave the second model out")


@pytest.fixture(scope="module")
def record() -> Any:
    return json.loads((FOLDER / "training.json").read_text())


def answer(model: Any, processor: Any, asked: list[Question]) -> list[str]:
    texts = []
    for one in asked:
        parts = [{"type": "image"}] if one.image is not None else []
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": one.question}]}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    images = [one.image for one in asked if one.image is not None]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs)
    return list(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_it_answers_the_kinds_it_learned(record: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    assert isinstance(model, InternVLForConditionalGeneration)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 16e6
    learned = [kind for kind in KINDS if record["scores"]["full"][kind] >= 80]
    assert len(learned) > len(KINDS) / 2
    asked = [one for one in questions("tuning", PER_KIND * len(KINDS)) if one.kind in learned]
    right = sum(
        text == one.answer for text, one in zip(answer(model, load_processor(FOLDER), asked), asked, strict=True)
    )
    assert right >= 0.75 * len(asked)


def test_it_is_small_and_its_files_name_no_place() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 32e6
    for file in FOLDER.glob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in text and not re.search(r'[\s"]/\w', text), file.name


def test_the_record_says_what_it_began_with(record: Any) -> None:
    first = record
    while first["before"]:  # runs that this one went on from
        first = first["before"]
    assert first["warm_start"].startswith("the language model") and record["architecture"] == "internvl"
    for scores in record["scores"].values():
        assert set(scores) == {*KINDS, "average"}
