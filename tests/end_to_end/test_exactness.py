"""What calibration computed is what the checkpoint computes, and a seed decides every byte of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, block_stream, contents, mixed_samples, small_batches, small_samples
from tiny_models import FAMILIES, VISION_FAMILIES, tiny_image

from quant_experts import QuantizationConfig, load, quantize
from quant_experts.artifacts import Sample
from quant_experts.calibration.statistics import collect_statistics, find_groups, split_held_out
from quant_experts.calibration.streaming import BlockStream
from quant_experts.config import DEFAULT_SCOPES, SCOPES
from quant_experts.kernels import cpu_int8, reference
from quant_experts.runtime.modules import QuantizedLinear

Folders = Callable[..., Path]


SCOPED = [
    *((family, DEFAULT_SCOPES) for family in FAMILIES),
    *((family, SCOPES) for family in VISION_FAMILIES),
    ("qwen3_vl", ("vision", "language")),
    ("llava_onevision", ("merger", "language")),
]


@pytest.mark.parametrize(("family", "scopes"), SCOPED)
def test_streaming_is_the_plain_forward_pass(tiny: Folders, family: str, scopes: tuple[str, ...]) -> None:
    """With nothing quantized, block by block and all samples in lockstep give bit-equal logits, with or without an
    image."""
    folder = tiny(family, layers=3)
    batches = small_batches(family, folder, make=mixed_samples)
    with block_stream(folder, batches, scopes=scopes) as stream:
        for index in stream.blocks():
            block = stream.skeleton.load_block(index, stream.device)
            stream.advance(block, finish=True)
            stream.skeleton.release_block(index)
        streamed = [output.logits for output in stream.outputs]
    model = load(folder)
    with torch.inference_mode():
        for batch, logits in zip(batches, streamed, strict=True):
            assert torch.equal(model(**batch.inputs, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("family", "scheme", "scopes"),
    [
        *((family, "W4A6", DEFAULT_SCOPES) for family in FAMILIES),
        ("qwen2_vl", "W3A16", DEFAULT_SCOPES),
        ("qwen2_vl", "W4A8g32-asym", DEFAULT_SCOPES),
        ("qwen3_vl", "W4A6", SCOPES),
        ("llava_onevision", "W3A16", SCOPES),
    ],
)
def test_the_checkpoint_is_the_model_that_was_calibrated(
    tiny: Folders, family: str, scheme: str, scopes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the last block's quantized output run on to the logits: those of the loaded checkpoint, bit for bit."""
    advance, streams = BlockStream.advance, []

    def to_the_end(stream: BlockStream, block: torch.nn.Module, **_: Any) -> None:
        streams.append(stream)
        advance(stream, block, finish=True)

    monkeypatch.setattr(BlockStream, "advance", to_the_end)
    config = QuantizationConfig.of(scheme, SMALL, scopes=scopes)
    quantize(tiny(family), small_samples(family), tmp_path / "out", config, device="cpu")
    model = load(tmp_path / "out")
    assert len(streams) == len(streams[0].skeleton.blocks) and len(streams[0].outputs) == 4
    with torch.inference_mode():
        for batch, output in zip(streams[0].batches, streams[0].outputs, strict=True):
            assert torch.equal(model(**batch.inputs, use_cache=False).logits, output.logits)


def test_one_seed_writes_the_same_bytes_and_another_does_not(tiny: Folders, tmp_path: Path) -> None:
    written = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        config = QuantizationConfig.of("W4A6", SMALL, seed=seed)
        quantize(tiny("qwen2_vl"), small_samples("qwen2_vl"), tmp_path / name, config, device="cpu")
        written.append(contents(tmp_path / name))
    assert written[0] == written[1]
    assert written[0].keys() == written[2].keys()
    assert any(written[0][file] != written[2][file] for file in written[0] if file.startswith("block"))


def test_backends_agree(quantized: Folders) -> None:
    """Equal codes, int32 sums and experts in every layer of a real checkpoint; floats differ by rounding only."""
    folder = quantized()
    inputs = small_batches("qwen2_vl", folder, 1)[0].inputs
    models = {backend: load(folder, backend=backend) for backend in ("cpu-int8", "reference")}
    seen: dict[str, torch.Tensor] = {}
    layers = {name: m for name, m in models["reference"].named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.inference_mode():
        logits = {backend: model(**inputs).logits for backend, model in models.items()}
    assert len(seen) == 14
    for name, layer in layers.items():
        x, operands = seen[name].reshape(-1, layer.in_features), layer.group.operands()
        plain, sorted_ = reference.prepare(x, operands), cpu_int8.prepare(x, operands)
        assert plain.codes is not None and sorted_.codes is not None and layer.weight_codes is not None
        assert plain.expert is not None and sorted_.expert is not None and sorted_.restore is not None
        assert torch.equal(plain.codes, sorted_.codes[sorted_.restore]), name
        assert torch.equal(plain.expert, sorted_.expert[sorted_.restore]), name
        exact = plain.codes.long() @ layer.weight_codes.long().T
        for backend, codes in ((reference, plain.codes), (cpu_int8, sorted_.codes[sorted_.restore])):
            product = backend.integer_product(codes, layer.weight_codes)
            assert product.dtype == torch.int32 and torch.equal(product.long(), exact), (name, backend)
    difference = (logits["cpu-int8"] - logits["reference"]).abs().max()
    assert difference < 1e-4 * logits["reference"].abs().max(), difference


def test_placing_a_model_changes_nothing(quantized: Folders) -> None:
    """`device_map="auto"` where there is no GPU means the CPU, in the CPU's dtype."""
    inputs = small_batches("qwen2_vl", quantized(), 1)[0].inputs
    plain, placed = load(quantized(), device_map="cpu"), load(quantized(), device_map="auto")
    if placed.device.type == "cpu":
        assert placed.dtype == plain.dtype == torch.float32
        with torch.inference_mode():
            assert torch.equal(placed(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("samples", [2, 8, 9, 16, 23, 24])
def test_an_eighth_is_held_out_and_at_least_one(samples: int) -> None:
    held_out, events = split_held_out(samples)
    assert len(held_out) == max(1, samples // 8) and held_out < set(range(samples)) and not events


def test_one_sample_alone_serves_both_purposes() -> None:
    held_out, events = split_held_out(1)
    assert held_out == {0} and "one sample only" in events[0].what


def test_a_held_out_sample_decides_nothing(tiny: Folders, tmp_path: Path) -> None:
    """Another one in its place changes the errors that are reported, and no tensor."""
    samples = small_samples("qwen2_vl", 9)
    (held_out,), _ = split_held_out(len(samples))
    other = Sample("Entirely different?", "yes", (tiny_image(112, 112, seed=99),))
    exchanged = [*samples[:held_out], other, *samples[held_out + 1 :]]
    for name, chosen in (("one", samples), ("two", exchanged)):
        quantize(tiny("qwen2_vl"), chosen, tmp_path / name, QuantizationConfig.of("W4A6", SMALL), device="cpu")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {file for file in one if one[file] != two[file]} == {"quantization_report.json"}
    reports = [json.loads(files["quantization_report.json"]) for files in (one, two)]
    for first, second in zip(*(report["groups"] for report in reports), strict=True):
        assert first["error"] != second["error"] and first["channel_frequency"] == second["channel_frequency"]


def test_a_sample_that_is_not_held_out_does_decide(tiny: Folders, tmp_path: Path) -> None:
    """The counterpart, so that the test above can fail: the order of two kinds of sample matters."""
    samples = small_samples("qwen2_vl", 8)
    for name, chosen in (("one", samples), ("two", [samples[7], *samples[1:7], samples[0]])):
        quantize(tiny("qwen2_vl"), chosen, tmp_path / name, QuantizationConfig.of("W4A6", SMALL), device="cpu")
    first, second = (load_file(tmp_path / name / "block-00000.safetensors") for name in ("one", "two"))
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_statistics_are_the_tokens_own(tiny: Folders) -> None:
    """Sums over the samples that are not held out, as a plain loop takes them; the reservoir has the others."""
    folder = tiny("qwen2_vl")
    batches = small_batches("qwen2_vl", folder, 5)
    inputs: list[torch.Tensor] = []
    model = load(folder)
    first = model.get_decoder().layers[0]
    first.self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        for batch in batches:
            model(**batch.inputs)
    with block_stream(folder, batches) as stream:
        next(stream.blocks())
        block = stream.skeleton.load_block(0, stream.device)
        groups, _ = find_groups(stream, block, together=True)
        assert groups[0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        held_out = frozenset({1, 4})
        found = collect_statistics(stream, block, groups, important_channels=8, held_out=held_out, seed=0)[groups[0]]
    fitted = torch.cat([inputs[i] for i in range(5) if i not in held_out]).double()
    assert found.tokens == len(fitted)
    torch.testing.assert_close(found.mean_abs, fitted.abs().mean(0))
    torch.testing.assert_close(found.second_moment, fitted.T @ fitted / len(fitted), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.reservoir, torch.cat([inputs[1], inputs[4]]))
    assert torch.equal(found.modality, torch.cat([batches[i].modality for i in range(5) if i not in held_out]))
