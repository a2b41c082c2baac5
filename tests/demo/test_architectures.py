"""Every architecture of the demo: a processor that fits its training batches, and weights that learn."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from quant_experts.demo import KINDS, questions
from quant_experts.demo.architecture import ARCHITECTURES, DEFAULT, IMAGE_TOKENS, build_model, build_tokenizer, save
from quant_experts.demo.forward import TrainingForward
from quant_experts.demo.stream import batch_of, encode
from quant_experts.demo.train import Progress as TrainingProgress
from quant_experts.demo.train import arguments, imitation_at, start, step, train
from quant_experts.demo.warm_start import Teacher, adopt_language, as_trained, record_of, relative_distance
from quant_experts.runtime.processor import load_processor

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny(architecture: str, seed: int = 0) -> Any:
    return build_model(build_tokenizer(architecture), seed, architecture, **TINY)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_processor_makes_the_training_batch(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    save(model, build_tokenizer(architecture), tmp_path)
    processor = load_processor(tmp_path)
    for asked in questions("tuning", len(KINDS)):
        parts = [{"type": "image"}] if asked.image is not None else []
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": asked.question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [asked.image] if asked.image is not None else None
        ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()
        whole, length = encode(build_tokenizer(), asked)
        assert ids == whole[:length]
        assert ids.count(model.config.image_token_id) == (IMAGE_TOKENS if images else 0)


def test_a_larger_picture_becomes_one_tile(tmp_path: Path) -> None:
    save(tiny("internvl"), build_tokenizer("internvl"), tmp_path)
    processor = load_processor(tmp_path)
    picture = questions("tuning", 1)[0].image
    assert picture is not None
    inputs = processor(text=["<IMG_CONTEXT>"], images=[picture.resize((500, 333))], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 168, 168)


def test_a_saved_internvl_loads_again(tmp_path: Path) -> None:
    saved = tiny("internvl")
    save(saved, build_tokenizer("internvl"), tmp_path)
    state = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(value.bfloat16().float(), state[name]), name


def test_internvl_is_small() -> None:
    with torch.device("meta"):
        model = build_model(build_tokenizer("internvl"), 0, "internvl")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 16e6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_few_steps_lower_the_loss(architecture: str) -> None:
    """First the teacher's image tokens are read and learned, then the tower's own."""
    model, teacher = tiny(architecture).train(), Teacher(tiny(DEFAULT, seed=1))
    batch, forward = batch_of(build_tokenizer(), "train", 0, 1), TrainingForward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    wanted = teacher.image_features(batch.images)
    distances, losses = [], []
    for share in (1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0):
        with torch.no_grad():
            distances.append(relative_distance(forward.image_features(batch.images), wanted).item())
        losses.append(step(forward, optimizer, batch, teacher, share).item())
    assert distances[3] < distances[0]
    assert losses[2] == pytest.approx(distances[2], rel=1e-3) and losses[6] < losses[4] - 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_image_tokens_begin_with_the_teachers_size(architecture: str) -> None:
    trained = tiny(DEFAULT, seed=1)
    for layer in (trained.model.visual.merger.mlp[0], trained.model.visual.merger.mlp[2]):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias, std=2.0)
    images, forward = batch_of(build_tokenizer(), "train", 0, 1).images, TrainingForward(tiny(architecture))
    Teacher(trained).prepare(forward, images)
    wanted, features = Teacher(trained).image_features(images), forward.image_features(images)
    assert torch.allclose(wanted.mean(dim=(0, 1)), features.mean(dim=(0, 1)), rtol=1e-3, atol=1e-3)
    assert 0.8 < wanted.std(dim=(0, 1)).mean() / features.std(dim=(0, 1)).mean() < 1.25


def test_the_language_model_is_adopted() -> None:
    trained, model = tiny(DEFAULT, seed=1), tiny("internvl")
    adopt_language(model, trained)
    tokens = torch.randint(0, 200, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens).logits, trained(input_ids=tokens).logits, atol=1e-5)


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--turns", "1", "--workers", "1", *options])
    return arguments()


def test_a_run_is_kept_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of one run that begins with the language model of another folder."""
    monkeypatch.setattr(
        "quant_experts.demo.train.build_model",
        lambda tokenizer, seed, architecture: build_model(tokenizer, seed, architecture, **TINY),
    )
    save(tiny(DEFAULT, seed=1), build_tokenizer(), tmp_path / "donor")
    options = ["--architecture", "internvl", "--language-from", str(tmp_path / "donor"), "--imitate", "100"]
    short = ["--measure-turns", "1", "--budget", "60", "--keep-every", "0"]
    train(call(monkeypatch, tmp_path / "run", *options, *short, "--call", "0"))
    first = record_of(tmp_path / "run")
    train(call(monkeypatch, tmp_path / "run", *options, *short, "--call", "0"))
    second = record_of(tmp_path / "run")
    assert (first["steps"], second["steps"]) == (1, 2)
    assert second["seconds"] > first["seconds"] and second["rendered_batches"] > first["rendered_batches"]
    assert second["warm_start"].startswith("the language model") and second["architecture"] == "internvl"
    assert set(second["scores"]) == {"full", "rtn_w4a6", "rtn_w4a4"}
    assert as_trained(tmp_path / "run").config.model_type == "internvl"
    model, _, optimizer = start(call(monkeypatch, tmp_path / "run", *options), build_tokenizer("internvl"))
    stored = as_trained(tmp_path / "run").state_dict()
    assert optimizer is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16().float(), stored[name]), name


def test_imitation_fades(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = call(monkeypatch, tmp_path, "--imitate", "100")
    weights = [imitation_at(TrainingProgress(seconds=seconds), options) for seconds in (0.0, 50.0, 75.0, 100.0, 300.0)]
    assert weights == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert imitation_at(TrainingProgress(), call(monkeypatch, tmp_path)) == 0.0
