"""Which modules a scope names, in which order they run, and what comes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_runs import SMALL, block_stream, contents, mixed_samples, small_batches, small_samples
from tiny_models import FAMILIES, VISION_FAMILIES, build_tiny
from torch import Tensor, nn

from quant_experts import QuantExpertsError, QuantizationConfig, load, quantize
from quant_experts.artifacts import Modality
from quant_experts.calibration.memory import estimate_memory
from quant_experts.calibration.scopes import image_encoder, is_linear, scope_modules
from quant_experts.calibration.sensitivity import branch_sensitivities
from quant_experts.calibration.skeleton import PausingBlock
from quant_experts.calibration.streaming import _hook_encoder
from quant_experts.config import RECIPES, SCOPES
from quant_experts.runtime.loading import model_class, read_config

Folders = Callable[..., Path]


class Otherwise(nn.Linear):
    """The same product, written another way."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Router(nn.Linear):
    """Chooses as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).topk(1, dim=1)  # type: ignore[return-value]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OfTwo(nn.Linear):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * other


def test_what_is_a_linear() -> None:
    for bias in (True, False):
        for device in ("cpu", "meta"):
            linear = Otherwise(5, 7, bias=bias, device=device)
            assert is_linear(nn.Linear(5, 7, bias=bias, device=device)) and is_linear(linear)
            assert linear.weight.shape == (7, 5), "it was only tried"
            assert not any(is_linear(kind(5, 7, bias=bias, device=device)) for kind in (Router, Doubled, OfTwo))
    assert not is_linear(nn.Conv1d(5, 7, 1)) and not is_linear(nn.Sequential(nn.Linear(5, 7)))
    falcon = transformers.models.falcon.modeling_falcon.FalconLinear(5, 7).bfloat16()
    before = torch.get_rng_state()
    assert is_linear(falcon) and torch.equal(torch.get_rng_state(), before), "a run repeats by its seed"


QWEN = "model.visual"
MODULES = {
    "qwen2_vl": ([f"{QWEN}.blocks.0", f"{QWEN}.blocks.1"], [f"{QWEN}.merger"]),
    "qwen2_5_vl": ([f"{QWEN}.blocks.0", f"{QWEN}.blocks.1"], [f"{QWEN}.merger"]),
    "qwen3_vl": ([f"{QWEN}.blocks.0", f"{QWEN}.blocks.1"], [f"{QWEN}.merger", f"{QWEN}.deepstack_merger_list.0"]),
    "internvl": (["model.vision_tower.encoder.layer.0", "model.vision_tower.encoder.layer.1"],
                 ["model.multi_modal_projector"]),
    "llava_onevision": (["model.vision_tower.encoder.layers.0", "model.vision_tower.encoder.layers.1"],
                        ["model.multi_modal_projector"]),
}  # fmt: skip


def empty(folder: Path) -> Any:
    """The model without memory."""
    config = read_config(folder)
    with torch.device("meta"):
        return model_class(config)(config)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_each_family_has_its_scopes(tiny: Folders, family: str) -> None:
    model = empty(tiny(family))
    vision, merger = MODULES[family]
    assert scope_modules(model, "vision") == vision
    assert scope_modules(model, "merger") == merger
    assert scope_modules(model, "language") == ["model.language_model.layers.0", "model.language_model.layers.1"]


def test_what_a_text_model_has_not(tiny: Folders) -> None:
    model = empty(tiny("qwen2"))
    assert scope_modules(model, "language") == ["model.layers.0", "model.layers.1"]
    for scope in ("vision", "merger"):
        with pytest.raises(QuantExpertsError, match=f"Qwen2ForCausalLM has no vision encoder.* scope '{scope}'"):
            scope_modules(model, scope)


def test_what_feeds_the_vision_blocks_or_is_a_linear_by_itself_is_no_merger(tiny: Folders) -> None:
    model = empty(tiny("llava_onevision"))
    tower = image_encoder(model)
    assert tower is not None
    tower.embeddings.linear_patches = nn.Sequential(nn.Linear(4, 4))
    assert scope_modules(model, "merger") == ["model.multi_modal_projector"]
    model.model.multi_modal_projector = nn.Linear(4, 4)
    with pytest.raises(QuantExpertsError, match="no module with linear layers between"):
        scope_modules(model, "merger")
    tower.encoder.layers = nn.ModuleList()
    with pytest.raises(QuantExpertsError, match="has no list of blocks with linear layers: leave the scope 'vision'"):
        scope_modules(model, "vision")


def test_stages_of_a_tower_are_its_blocks(tiny: Folders) -> None:
    model = empty(tiny("internvl"))
    stages = [nn.ModuleList([nn.Linear(2, 2)] * length) for length in (2, 2, 6, 2)]
    model.model.vision_tower.encoder.layer = nn.ModuleList(nn.Sequential(stage) for stage in stages)
    assert scope_modules(model, "vision") == [f"model.vision_tower.encoder.layer.{i}" for i in range(4)]


def test_a_pausing_block_answers_for_the_block() -> None:
    """transformers keeps hidden states of modules by class: LLaVA-OneVision's image features are such."""
    block = PausingBlock(3, nn.Linear(2, 5), lambda index, args, kwargs: (index, *args))
    assert isinstance(block, nn.Linear) and isinstance(block, PausingBlock) and type(block) is PausingBlock
    assert block.out_features == 5 and not list(block.parameters()) and block(7) == (3, 7)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_image_tokens_come_in_order_and_in_the_estimated_number(tiny: Folders, family: str) -> None:
    """A sample without an image waits for the language model. Qwen3-VL calls a merger between its vision blocks."""
    folder = tiny(family)
    batches = small_batches(family, folder, make=mixed_samples)
    order, brought = [], {}
    with block_stream(folder, batches, scopes=SCOPES) as stream:
        estimate = estimate_memory(stream, SMALL)
        for index in stream.blocks():
            block = stream.skeleton.load_block(index, stream.device)
            order.append(stream.skeleton.block_names[index])
            if stream.scope == "language":
                assert stream.waiting == [0, 1, 2, 3, 4] and torch.equal(stream.modality(1), batches[1].modality)
            else:
                assert stream.waiting == [1, 2, 3, 4] and list(stream.run(block)) == stream.waiting
                assert all((stream.modality(i) == Modality.IMAGE).all() for i in stream.waiting)
                brought[index] = sum(len(stream.modality(i)) for i in stream.waiting)
            stream.advance(block)
            stream.skeleton.release_block(index)
        assert not stream.never_run
    vision, merger = MODULES[family]
    between = [vision[0], merger[1], vision[1], merger[0]] if family == "qwen3_vl" else [*vision, *merger]
    assert order == [*between, "model.language_model.layers.0", "model.language_model.layers.1"]
    language = sum(len(batch.modality) for batch in batches)
    assert estimate.hidden == pytest.approx(2 * 4 * 64 * max(brought[0], language), rel=0.1)
    widest = 256 if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl") else 128
    assert estimate.statistics >= 8 * widest**2


@pytest.mark.parametrize(
    ("scopes", "hooked"),
    [
        (SCOPES, ["patch_embed", "pos_embed"]),
        (("merger", "language"), ["patch_embed", "pos_embed", "blocks.0", "blocks.1"]),
        (("language",), [""]),
    ],
)
def test_what_is_left_of_the_encoder_runs_apart(tiny: Folders, scopes: tuple[str, ...], hooked: list[str]) -> None:
    """As on a GPU, where it is moved there: the parts without blocks, with all that passes between them on the host."""
    folder = tiny("qwen3_vl")
    batches = small_batches("qwen3_vl", folder, make=mixed_samples)
    with block_stream(folder, batches, scopes=scopes) as stream:
        parts = stream._encoder = _hook_encoder(stream.skeleton.model, torch.device("cpu"))
        names = {module: name for name, module in stream.skeleton.model.named_modules()}
        assert [names[part] for part in parts] == [f"{QWEN}.{name}".removesuffix(".") for name in hooked]
        for index in stream.blocks():
            stream.advance(stream.skeleton.load_block(index, stream.device), finish=True)
    model = load(folder)
    with torch.inference_mode():
        for batch, output in zip(batches, stream.outputs, strict=True):
            assert torch.equal(model(**batch.inputs, use_cache=False).logits, output.logits)


@pytest.mark.parametrize("scopes", [("vision",), ("merger",)])
def test_without_an_image_nothing_comes_to_them(tiny: Folders, scopes: tuple[str, ...]) -> None:
    folder = tiny("qwen2_vl")
    batches = small_batches("qwen2_vl", folder, 0, make=mixed_samples)
    with (
        block_stream(folder, batches, scopes=scopes) as stream,
        pytest.raises(QuantExpertsError, match=f"No image ran through the blocks of the scope '{scopes[0]}'"),
    ):
        next(stream.blocks())


def test_only_the_image_samples_count_in_front_of_the_language_model(tiny: Folders, tmp_path: Path) -> None:
    samples = mixed_samples("qwen2_vl")
    config = QuantizationConfig.of("W4A6", "rtn", scopes=SCOPES)
    result = quantize(tiny("qwen2_vl"), samples, tmp_path / "out", config, device="cpu")
    patches = {record.linears[0]: record.tokens for record in result.records}
    images = sum(count for batch in small_batches("qwen2_vl", tiny("qwen2_vl"))[:-1] for count in [image_tokens(batch)])
    assert patches["model.visual.blocks.0.attn.qkv"] == 4 * images  # the last image is held out
    assert patches["model.visual.merger.mlp.0"] == images
    for record in result.records:
        expected = {"all", "image"} if "visual" in record.linears[0] else {"all", "text", "image", "answer"}
        assert record.error.keys() == record.rtn_error.keys() == expected, record.linears


def image_tokens(batch: Any) -> int:
    return int((batch.modality == Modality.IMAGE).sum())


def test_one_image_among_texts_is_said(tiny: Folders, tmp_path: Path) -> None:
    config = QuantizationConfig.of("W4A6", "rtn", scopes=("merger",))
    result = quantize(tiny("qwen2_vl"), mixed_samples("qwen2_vl", 1), tmp_path / "out", config, device="cpu")
    assert [event.what for event in result.events if "one sample with an image only" in event.what]
    assert all(record.error["image"] > 0 for record in result.records)


def test_a_merger_that_never_runs_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a merger for a vision block that it does not have."""
    row = FAMILIES["qwen3_vl"]

    def config(text: dict[str, Any], token_id: Callable[[str], int]) -> transformers.PreTrainedConfig:
        made = row.config(text, token_id)
        made.vision_config.deepstack_visual_indexes = [0, 7]
        return made

    monkeypatch.setitem(FAMILIES, "qwen3_vl", replace(row, config=config))
    folder = build_tiny("qwen3_vl", tmp_path / "model")
    chosen = QuantizationConfig.of("W4A6", "rtn", scopes=("merger",))
    result = quantize(folder, small_samples("qwen3_vl"), tmp_path / "out", chosen, device="cpu")
    unused = f"{QWEN}.deepstack_merger_list.1"
    assert [event.where for event in result.events if "no calibration sample ran through it" in event.what] == [unused]
    assert {f"{unused}.linear_fc1", f"{unused}.linear_fc2"} <= set(result.config.ignore)
    before, after = load(folder).state_dict(), load(tmp_path / "out").state_dict()
    same = [key for key in before if key.startswith(unused)]
    assert len(same) >= 4 and all(torch.equal(before[key], after[key]) for key in same)


def test_a_run_of_all_scopes_repeats_and_resumes_bit_for_bit(tiny: Folders, quantized: Folders, tmp_path: Path) -> None:
    """Stopped after a vision block and the merger behind it."""

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise InterruptedError

    model, samples = tiny("qwen3_vl"), mixed_samples("qwen3_vl")
    config = QuantizationConfig.of("W4A6", SMALL, scopes=SCOPES)
    with pytest.raises(InterruptedError):
        quantize(model, samples, tmp_path / "out", config, device="cpu", progress=stop)
    with pytest.raises(QuantExpertsError, match=r"other settings \(config\)"):
        quantize(model, samples, tmp_path / "out", QuantizationConfig.of("W4A6", SMALL), device="cpu")
    assert quantize(model, samples, tmp_path / "out", config, device="cpu").resumed_blocks == 2
    assert contents(tmp_path / "out") == contents(quantized("qwen3_vl", "W4A6", scopes=SCOPES))


def test_mbq_weighs_the_language_model_alike_whatever_else_is_quantized(tiny: Folders, tmp_path: Path) -> None:
    folder = tiny("qwen3_vl")
    batches = small_batches("qwen3_vl", folder, 2)
    found = []
    for scopes in (("language",), SCOPES):
        with block_stream(folder, batches, scopes=scopes, differentiable=True) as stream:
            found.append(branch_sensitivities(stream))
    assert found[0] == found[1] and len(found[0]) == 2
    config = QuantizationConfig.of("W4A6", RECIPES["mbq"], scopes=SCOPES)
    quantize(folder, mixed_samples("qwen3_vl", 2), tmp_path / "out", config, device="cpu")
    with torch.inference_mode():
        assert load(tmp_path / "out")(**batches[0].inputs).logits.isfinite().all()


def test_files_may_call_parts_of_a_block_otherwise(tiny: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some vision encoders' do (mlp.c_fc for mlp.fc1): what is written goes by the block's own names behind the
    files' name for the block, or its own name where no file key tells."""
    folder = tiny("qwen2_vl")
    with block_stream(folder, [], scopes=("vision",)) as stream:
        skeleton = stream.skeleton
        block = f"{QWEN}.blocks.1"
        own = {name: key for name, key in skeleton.keys.items() if name.startswith(f"{block}.")}
        monkeypatch.setattr(skeleton.files, "read", lambda key: torch.zeros(1))
        renamed = {name: key.replace("mlp.fc", "mlp.c_fc") for name, key in own.items()}
        monkeypatch.setattr(skeleton, "keys", renamed)
        prefix, rest = skeleton.file_names(1, {"mlp.fc1.weight_packed": torch.zeros(1)}, guard=True)
        assert prefix == own[f"{block}.norm1.weight"].removesuffix(".norm1.weight")
        assert f"{prefix}.mlp.c_fc1.bias" in rest and f"{prefix}.mlp.c_fc1.weight" not in rest
        assert not rest[f"{prefix}.mlp.fc1.weight"].numel()
        monkeypatch.setattr(skeleton, "keys", {name: f"{key}.v2" for name, key in own.items()})
        assert skeleton.file_names(1, {})[0] == block
