"""Likelihood and divergence against sums over single tokens in float64."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VISION_FAMILIES, build_tiny, tiny_image
from transformers import AutoConfig

from quant_experts.artifacts import CalibrationBatch, Modality, Sample
from quant_experts.calibration.batches import make_batches
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.fidelity import answer_kl, answer_log_probs, answer_nll, answer_tokens
from quant_experts.runtime.loading import model_class
from quant_experts.runtime.processor import load_processor

# The InternVL processor of transformers 5.17 gives NumPy a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_against_single_tokens(family: str, tmp_path: Path) -> None:
    folder = build_tiny(family, tmp_path / "first")
    other = build_tiny(family, tmp_path / "second", seed=1)
    config = AutoConfig.from_pretrained(folder)
    images = (tiny_image(),) if family in VISION_FAMILIES else ()
    samples = [Sample("What?", "A cat.", images), Sample("2 + 2?", "4")]
    # As long as the first, with another image and an answer that begins elsewhere: both go through side by side.
    samples.append(Sample("What ?", "A cat", tuple(tiny_image(seed=3) for _ in images)))
    batches, _ = make_batches(samples, load_processor(folder), config)
    assert batches[0].inputs["input_ids"].shape == batches[2].inputs["input_ids"].shape
    models = [model_class(config).from_pretrained(path).eval() for path in (folder, other)]
    first, second = (answer_log_probs(model, batches) for model in models)

    for index, batch in enumerate(batches):
        with torch.inference_mode():
            logits, others = (model(**batch.inputs).logits[0].double().tolist() for model in models)
        nll, kl = [], []
        for position, label in enumerate(batch.modality.tolist()):
            if label == Modality.ANSWER:
                p, q = naive_log_softmax(logits[position - 1]), naive_log_softmax(others[position - 1])
                nll.append(-p[int(batch.inputs["input_ids"][0, position])])
                kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        assert first[index].shape == (len(nll), config.get_text_config().vocab_size)
        assert answer_nll(first, batches)[index].item() == pytest.approx(sum(nll) / len(nll), abs=1e-5)
        assert answer_kl(first, second)[index].item() == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert answer_kl(first, first).tolist() == [0, 0, 0] and bool((answer_kl(first, second) > 0).all())


def naive_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def test_impossible_tokens_add_nothing() -> None:
    p = torch.tensor([[1.0, 0.0]]).log()
    q = torch.tensor([[0.5, 0.5]]).log()
    assert answer_kl([p], [q]).item() == pytest.approx(math.log(2))
    assert answer_kl([p], [p]).item() == 0 and answer_kl([q], [p]).item() == math.inf


def test_bad_input() -> None:
    ids = torch.tensor([[1, 2, 3]])
    silent = CalibrationBatch(dict(input_ids=ids), torch.zeros(3, dtype=torch.int8))
    with pytest.raises(QuantExpertsError, match="Sample 1 has no answer"):
        answer_log_probs(torch.nn.Linear(1, 1), [silent])
    with pytest.raises(ValueError, match="shapes"):
        answer_kl([torch.zeros(1, 2)], [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="argument"):
        answer_kl([torch.zeros(1, 2)], [])
    batch = CalibrationBatch(dict(input_ids=ids), torch.tensor([0, 2, 2], dtype=torch.int8))
    assert answer_tokens(batch).tolist() == [2, 3]
