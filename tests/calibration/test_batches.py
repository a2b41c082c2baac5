"""Token labels against counting by hand, for every family; limits, refusals and events."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VISION_FAMILIES, build_tiny, tiny_image
from transformers import AutoConfig

from quant_experts.artifacts import Modality, Sample
from quant_experts.calibration.batches import count_tokens, make_batches, render_prompt
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.processor import find_tokenizer, load_processor

# The InternVL processor of transformers 5.17 gives NumPy a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

IMAGE_TOKENS = {"internvl": "<IMG_CONTEXT>", "llava_onevision": "<image>"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Family -> (processor, config)."""
    folders: dict[str, Path] = {
        family: build_tiny(family, tmp_path_factory.mktemp(family), layers=1) for family in FAMILIES
    }
    return {family: (load_processor(folder), AutoConfig.from_pretrained(folder)) for family, folder in folders.items()}


def samples(family: str) -> list[Sample]:
    if family not in VISION_FAMILIES:
        return [Sample("2 + 2?", "4"), Sample("häß?", "ünï " * 9)]
    images = tiny_image(100, 80), tiny_image(130, 60, seed=1)
    return [Sample("What?", "A cat.", images[:1]), Sample("2 + 2?", "4"), Sample("The same?\n", "no", images)]


def naive_labels(ids: list[int], tokenizer: Any, family: str, answer: str) -> list[int]:
    """The tiny tokenizer has one token per byte and its template puts two tokens behind an answer, of which one ends
    it.
    """
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS.get(family, "<|image_pad|>"))
    labels = [Modality.IMAGE if token == image_id else Modality.TEXT for token in ids]
    count = len(answer.encode()) + 1
    labels[len(ids) - 1 - count : len(ids) - 1] = [Modality.ANSWER] * count
    return labels


@pytest.mark.parametrize("family", FAMILIES)
def test_labels(family: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    processor, config = loaded[family]
    tokenizer = find_tokenizer(processor)
    given = samples(family)
    batches, events = make_batches(given, processor, config)
    assert len(batches) == len(given) and not events
    for sample, batch in zip(given, batches, strict=True):
        ids = batch.inputs["input_ids"]
        assert ids.shape == (1, len(batch.modality)) and batch.modality.dtype == torch.int8
        assert batch.modality.tolist() == naive_labels(ids[0].tolist(), tokenizer, family, sample.answer)
        answer = tokenizer.decode(ids[0][batch.modality == Modality.ANSWER])
        assert answer == sample.answer + "<|im_end|>"
        assert bool((batch.modality == Modality.IMAGE).any()) == bool(sample.images)
        assert ("pixel_values" in batch.inputs) == bool(sample.images)
    counts = count_tokens(batches)
    assert sum(counts.values()) == sum(len(batch.modality) for batch in batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_what_generation_sees(family: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    processor, config = loaded[family]
    sample = samples(family)[0]
    batch = make_batches([sample], processor, config)[0][0]
    images = {"images": [list(sample.images)]} if sample.images else {}
    text = render_prompt(processor, sample.question, len(sample.images))
    prompt = processor(text=[text], return_tensors="pt", **images)["input_ids"][0]
    start = int((batch.modality == Modality.ANSWER).nonzero()[0])
    assert torch.equal(batch.inputs["input_ids"][0][:start], prompt)


def test_only_what_the_model_takes(loaded: dict[str, tuple[Any, Any]]) -> None:
    processor, config = loaded["qwen2_vl"]

    class Chatty:
        """A processor that returns one key too many."""

        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, **options: Any) -> Any:
            return dict(processor(**options), token_type_ids=torch.zeros(1))

    batch = make_batches(samples("qwen2_vl"), Chatty(), config)[0][0]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_limit_cuts_the_end_or_drops(family: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    processor, config = loaded[family]
    sample = Sample("What?", "long " * 20, (tiny_image(),))
    whole = make_batches([sample], processor, config)[0][0]
    last_image = int((whole.modality == Modality.IMAGE).nonzero()[-1])
    length = len(whole.modality)

    (cut,), events = make_batches([sample], processor, config, max_tokens=last_image + 1)
    assert torch.equal(cut.modality, whole.modality[: last_image + 1])
    for key, value in cut.inputs.items():
        sequence = whole.inputs[key].shape == (1, length)
        assert torch.equal(value, whole.inputs[key][:, : last_image + 1] if sequence else whole.inputs[key])
    assert [event.where for event in events] == ["sample 1"] and f"{length} tokens" in events[0].what

    batches, events = make_batches([sample, Sample("2 + 2?", "4")], processor, config, max_tokens=last_image)
    assert len(batches) == 1 and "dropped" in events[0].what
    assert not make_batches([sample], processor, config, max_tokens=length)[1]
    with pytest.raises(QuantExpertsError, match="None of 1 samples fits"):
        make_batches([sample], processor, config, max_tokens=last_image)


def test_text_only_samples_for_a_vision_model_are_reported(loaded: dict[str, tuple[Any, Any]]) -> None:
    _, events = make_batches([Sample("2 + 2?", "4")], *loaded["qwen2_vl"])
    assert [event.where for event in events] == ["samples"] and "none has an image" in events[0].what


def test_refusals(loaded: dict[str, tuple[Any, Any]]) -> None:
    image = (tiny_image(),)
    with pytest.raises(QuantExpertsError, match="sample 2 has an image but the model takes text only"):
        make_batches([Sample("a", "b"), Sample("a", "b", image)], *loaded["qwen2"])
    with pytest.raises(QuantExpertsError, match="no samples"):
        make_batches([], *loaded["qwen2_vl"])
    with pytest.raises(QuantExpertsError, match="at least one token"):
        make_batches([Sample("a", "b")], *loaded["qwen2_vl"], max_tokens=0)
    with pytest.raises(QuantExpertsError, match="sample 1 is refused by the model's processor"):
        make_batches([Sample("what is <|image_pad|>?", "b", image)], *loaded["qwen2_vl"])
    with pytest.raises(QuantExpertsError, match=r"^a\.jsonl line 7 is refused by the model's processor"):
        make_batches([Sample("what is <|image_pad|>?", "b", image, "a.jsonl line 7")], *loaded["qwen2_vl"])


def test_sample_without_answer_has_no_answer_tokens(loaded: dict[str, tuple[Any, Any]]) -> None:
    batch = make_batches([Sample("tell me", "", (tiny_image(),))], *loaded["qwen3_vl"])[0][0]
    assert set(batch.modality.tolist()) == {Modality.TEXT, Modality.IMAGE}


def test_without_chat_template(tmp_path: Path) -> None:
    folder = build_tiny("qwen2_vl", tmp_path, layers=1)
    processor = load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = None
    assert render_prompt(processor, "Q?", 2, "A") == "<|image_pad|><|image_pad|>Q?\nA"
    batch = make_batches([Sample("Q?", "A", (tiny_image(),))], processor, AutoConfig.from_pretrained(folder))[0][0]
    ids = batch.inputs["input_ids"][0]
    assert processor.decode(ids[batch.modality == Modality.ANSWER]) == "A"


def test_template_kept_with_the_tokenizer_alone(tmp_path: Path) -> None:
    processor = load_processor(build_tiny("qwen2_vl", tmp_path, layers=1))
    expected = render_prompt(processor, "Q?", 1)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert render_prompt(processor, "Q?", 1) == expected


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_of_one_sample_stay_together(family: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    """Calibration sees as many image tokens as the same question has in an evaluation batch."""
    processor, config = loaded[family]
    sample = samples(family)[-1]
    batch = make_batches([sample], processor, config)[0][0]
    text = render_prompt(processor, sample.question, len(sample.images))
    together = processor(text=[text], images=[list(sample.images)], return_tensors="pt")
    for key in ("pixel_values", "batch_num_images"):
        assert key not in together or torch.equal(batch.inputs[key], together[key])
