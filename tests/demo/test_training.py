"""The forward pass, the batches and the measurements of the training script."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_experts.demo import KINDS, Question, questions
from quant_experts.demo.architecture import ARCHITECTURES, build_model, build_tokenizer, prompt, save
from quant_experts.demo.forward import TrainingForward
from quant_experts.demo.measure import RoundedLinear, exact_match, rounded
from quant_experts.demo.stream import IGNORED, LENGTH, Batch, Stream, batch_of, row_of
from quant_experts.runtime.processor import load_processor

TURNS = 2
TINY = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny_model(request: pytest.FixtureRequest) -> Any:
    return build_model(build_tokenizer(request.param), 0, request.param, **TINY).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(build_tokenizer(), "tuning", 0, TURNS)


@torch.no_grad()
def test_training_forward_is_the_models_own(tiny_model: Any, batch: Batch, tmp_path: Path) -> None:
    forward = TrainingForward(tiny_model)
    fast = forward.logits(batch.tokens, forward.image_features(batch.images))
    save(tiny_model, build_tokenizer(tiny_model.config.model_type), tmp_path)
    processor = load_processor(tmp_path)
    for index, asked in enumerate(questions("tuning", TURNS * len(KINDS))):
        images = [asked.image] if asked.image is not None else None
        text = chat(processor, asked) + asked.answer + "<|im_end|>"
        inputs = processor(text=[text], images=images, return_tensors="pt")
        own = tiny_model(**inputs).logits[0]
        assert torch.allclose(own, fast[row_of(index, TURNS), : len(own)], rtol=0, atol=1e-4)


def chat(processor: Any, asked: Question) -> str:
    parts = [{"type": "image"}] if asked.image is not None else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": asked.question}]}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def test_targets_are_the_answers(batch: Batch) -> None:
    tokenizer = build_tokenizer()
    for index, asked in enumerate(questions("tuning", TURNS * len(KINDS))):
        row = batch.targets[row_of(index, TURNS)]
        assert tokenizer.decode(row[row != IGNORED]) == asked.answer + "<|im_end|>"


def test_rows_fit() -> None:
    tokenizer = build_tokenizer()
    for asked in questions("train", 350):
        whole = prompt(asked.question, image=asked.image is not None) + asked.answer + "<|im_end|>"
        assert len(tokenizer.encode(whole)) <= LENGTH


def test_the_stream_renders_the_train_split() -> None:
    tokenizer = build_tokenizer()
    stream = Stream(tokenizer, turns=1, workers=1, first=0)
    try:
        got = next(stream.batches(torch.device("cpu")))
    finally:
        stream.close()
    expected = batch_of(tokenizer, "train", 0, 1)
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.targets, expected.targets)
    assert torch.equal(got.images, expected.images)


def test_rounding_is_plain_round_to_nearest() -> None:
    linear = torch.nn.Linear(3, 1, bias=False)
    linear.weight.data = torch.tensor([[7.0, -3.4, 1.6]])
    layer = RoundedLinear(linear, 4)
    assert torch.equal(layer.weight, torch.tensor([[7.0, -3.0, 2.0]]))
    assert torch.allclose(layer(torch.tensor([[14.0, 3.1, 0.9]])), torch.tensor([[7 * 14.0 - 3 * 4.0 + 2 * 0.0]]))


def test_measuring_counts_whole_answers(tiny_model: Any, batch: Batch) -> None:
    quantized = rounded(tiny_model, 6)
    layers = [module for module in quantized.modules() if isinstance(module, RoundedLinear)]
    assert len(layers) == 7 * TINY["num_hidden_layers"]
    scores = exact_match(quantized, [batch])
    assert set(scores) == {*KINDS, "average"} and scores["average"] == 0.0
