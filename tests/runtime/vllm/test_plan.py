"""Which linears a layer of vLLM holds: fused ones, those of one group elsewhere, partly quantized ones, none."""

import pytest

from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.config import RECIPES, Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.vllm.plan import LayerPlan

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "qkv": ["qkv"]}
BLOCK = "model.language_model.layers.0"


def attention(*leaves: str, block: str = BLOCK) -> tuple[str, ...]:
    return tuple(f"{block}.self_attn.{leaf}_proj" for leaf in leaves)


def plan(*groups: tuple[str, ...]) -> LayerPlan:
    specs = tuple(GroupSpec(linears=group) for group in groups)
    return LayerPlan(CheckpointConfig(scheme=Scheme.parse("W4A6"), recipe=RECIPES["paper"], groups=specs))


def rename(name: str) -> str | None:
    """As vLLM's Qwen2-VL does."""
    for old, new in {"model.language_model.": "language_model.model.", "model.visual.": "visual."}.items():
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name


def stored(*linears: str) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors in files, of linears with 8, 9, ... output channels."""
    shapes = {f"{linear}.weight_scale": (8 + i, 1) for i, linear in enumerate(linears)}
    return shapes | {f"{linear}.weight_shape": (2,) for linear in linears}


def names(found: LayerPlan, layer: str) -> list[str]:
    return [part.name for part in found.parts(layer, FUSED)]


@pytest.mark.parametrize("together", [True, False])
def test_a_fused_layer_holds_its_linears_in_the_order_of_its_outputs(together: bool) -> None:
    linears = attention("v", "q", "k")
    found = plan(linears) if together else plan(*((linear,) for linear in linears))
    found.rename(rename)
    found.rename(rename)  # a model within a model
    assert names(found, "language_model.model.layers.0.self_attn.qkv_proj") == list(attention("q", "k", "v"))
    found.check_all_found()


def test_the_guard_belongs_to_the_first_linear_of_all() -> None:
    found = plan(attention("q", "k", "v"), (f"{BLOCK}.mlp.down_proj",))
    parts = found.parts(f"{BLOCK}.self_attn.qkv_proj", FUSED) + found.parts(f"{BLOCK}.mlp.down_proj", FUSED)
    assert [part.guarded for part in parts] == [True, False, False, False]


def test_a_linear_that_is_fused_in_files_is_found_by_its_own_name() -> None:
    found = plan(("visual.blocks.0.attn.qkv",), ("layers.0.qkv_proj",))
    assert names(found, "visual.blocks.0.attn.qkv") == ["visual.blocks.0.attn.qkv"]
    assert names(found, "layers.0.qkv_proj") == ["layers.0.qkv_proj"]


def test_names_in_files_count() -> None:
    """LLaVA-OneVision: files, modules and vLLM have three names."""
    inside = "encoder.layers.0.self_attn"
    vision = tuple(f"model.vision_tower.{inside}.{leaf}_proj" for leaf in "qkv")
    text = attention("q", "k", "v")
    found = plan(vision, text)
    files = [name.replace(f"model.vision_tower.{inside}", f"vision_tower.vision_model.{inside}") for name in vision]
    files += [name.replace("model.language_model.", "language_model.model.") for name in text]
    found.use_files(stored(*files) | {"language_model.model.norm.weight": (4,)})
    assert names(found, f"vision_tower.vision_model.{inside}.qkv_proj") == list(vision)
    assert names(found, "language_model.model.layers.0.self_attn.qkv_proj") == list(text)


def test_a_linear_that_files_do_not_hold_is_named() -> None:
    with pytest.raises(QuantExpertsError, match=r"layers\.0\.self_attn\.k_proj\.weight_shape' is missing"):
        plan(attention("q", "k")).use_files(stored(*attention("q")))


def test_files_say_how_many_outputs_a_linear_has() -> None:
    found = plan(attention("q", "k", "v"))
    layer = f"{BLOCK}.self_attn.qkv_proj"
    assert [part.rows for part in found.parts(layer, FUSED)] == [None] * 3
    found.use_files(stored(*attention("q", "k", "v")))
    assert [part.rows for part in found.parts(layer, FUSED)] == [8, 9, 10]


def test_what_models_do_not_say_of_fused_layers_is_known_by_custom() -> None:
    found = plan(attention("q", "k", "v"))
    assert len(found.parts(f"{BLOCK}.self_attn.qkv_proj", {})) == 3


def test_other_layers_are_in_full_precision() -> None:
    found = plan(attention("q", "k", "v"))
    assert not names(found, f"{BLOCK}.mlp.gate_up_proj") and not names(found, "lm_head")


def test_a_layer_that_is_quantized_in_part_is_refused() -> None:
    with pytest.raises(QuantExpertsError, match=r"q_proj' and '.*v_proj' in one layer .* quantize both or neither"):
        names(plan(attention("q", "k")), f"{BLOCK}.self_attn.qkv_proj")


def test_two_linears_of_one_name_are_refused() -> None:
    found = plan(attention("q"), ("visual.layers.0.self_attn.q_proj",))
    with pytest.raises(QuantExpertsError, match=r"one name for '.*q_proj' and '.*q_proj'"):
        found.rename(lambda name: name.rpartition("layers.")[2])


def test_linears_of_a_group_may_be_in_several_layers() -> None:
    """Blocks whose attention and MLP read the same input."""
    found = plan((*attention("q", "k", "v"), f"{BLOCK}.mlp.up"))
    assert names(found, f"{BLOCK}.self_attn.qkv_proj") == list(attention("q", "k", "v"))
    with pytest.raises(QuantExpertsError, match=r"could hold the quantized '.*mlp\.up'"):
        found.check_all_found()
    assert names(found, f"{BLOCK}.mlp.up") == [f"{BLOCK}.mlp.up"]
    found.check_all_found()


def test_a_linear_without_a_layer_is_named() -> None:
    expert = f"{BLOCK}.mlp.experts.0.down_proj"
    found = plan(attention("o"), (expert,))
    names(found, f"{BLOCK}.self_attn.o_proj")
    with pytest.raises(QuantExpertsError, match=rf"no layer that could hold the quantized '{expert}'"):
        found.check_all_found()
