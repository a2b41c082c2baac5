"""Quantized models under `torch.compile`: one operation for each group, no graph breaks, the same numbers."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.test_modules import SCHEMES, SIZES, K, install, normal
from small_runs import small_batches
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from quant_experts.kernels import reference
from quant_experts.kernels.dispatch import Backend, Layout
from quant_experts.runtime import modules
from quant_experts.runtime.loading import load


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Without gradients and without graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
    ],
)


class Compiled:
    """A backend that runs graphs as they were traced, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        self.graphs.append(graph)
        return graph

    def groups(self, graph: int = 0) -> int:
        """How many groups a graph computes."""
        wanted = torch.ops.quant_experts.group_outputs.default
        return sum(node.target is wanted for node in self.graphs[graph].graph.nodes)


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that lays weights out in a form of its own, as those for GPUs do."""

    def apply(x: Tensor, packed: Any) -> Tensor:
        prepared = reference.prepare(x.reshape(-1, x.shape[-1]), packed[0])
        parts = [reference.linear(prepared, linear) for linear in packed[1]]
        return torch.cat(parts, dim=1).to(x.dtype).view(*x.shape[:-1], -1)

    def codes(packed: Any, rows: slice, columns: int) -> Tensor:
        return torch.cat([linear.codes for linear in packed[1]])[rows, :columns]

    layout = Layout(lambda group, linears, dtype: (group, linears), apply, codes)
    backend = Backend(
        "stacking", "any", ("integer",), reference.prepare, reference.linear, lambda activations: True, layout=layout
    )
    monkeypatch.setattr(modules, "select", lambda *choice: backend)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_before_it_ever_ran_it_gives_the_same(scheme: str, backend: str) -> None:
    quantized, _ = install(scheme)
    x = normal(5, K, seed=8)
    found = torch.compile(quantized, fullgraph=True, backend=backend)(x)
    assert torch.equal(found, quantized(x))


@pytest.mark.parametrize("backend", [INDUCTOR])
def test_generated_code_gives_the_same(backend: str) -> None:
    quantized, _ = install()
    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    for x in (normal(5, K, seed=8), normal(2, 9, K, seed=9)):
        assert torch.equal(compiled(x), quantized(x))


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_stacked_weights_give_the_same(backend: str) -> None:
    quantized, _ = install()
    x = normal(2, 5, K, seed=8)
    expected = [linear(x) for linear in quantized.attn.values()]
    found = torch.compile(quantized, fullgraph=True, backend=backend)(x)
    assert all(linear.weight_codes is None for linear in quantized.attn.values())
    assert torch.equal(found, torch.cat(expected, dim=-1))


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("backend", [INDUCTOR])
def test_stacked_outputs_may_be_changed_in_place(backend: str) -> None:
    """The outputs of a group are parts of one tensor: generated code that writes into one must leave the others."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = install()[0].attn

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (linear(x) for linear in self.attn.values())
            return q.mul_(2).relu(), k.add_(1).sigmoid(), v

    model, x = Changing(), normal(6, K, seed=8)
    found = torch.compile(model, fullgraph=True, backend=backend)(x)
    for one, other in zip(found, model(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_group_is_one_operation_for_any_number_of_tokens() -> None:
    """Two graphs for matrices: the first number of tokens, and any. (One token has a graph of its own as well.)"""
    quantized, _ = install()
    backend = Compiled()
    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    for tokens in (5, 7, 9, 2, 33, 64, 128):
        x = normal(tokens, K, seed=tokens)
        assert torch.equal(compiled(x), quantized(x))
    assert len(backend.graphs) == 2
    assert [backend.groups(i) for i in range(2)] == [1, 1]
    assert torch.equal(compiled(x[:1]), quantized(x[:1])) and len(backend.graphs) == 3


def test_a_new_input_is_computed_anew() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = install()[0].attn

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.attn[name](z) for z in (x, y) for name in ("q", "k", "v")], dim=-1)

    model, backend = TwoInputs(), Compiled()
    x, y = normal(4, K, seed=8), normal(4, K, seed=9)
    assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x, y), model(x, y))
    assert backend.groups() == 2


def test_a_group_that_is_used_in_part_gives_the_same() -> None:
    """What the other linears did not take stays behind, in eager and traced calls alike, and is never mistaken."""
    quantized, _ = install()
    q = torch.compile(quantized.attn["q"], fullgraph=True, backend="eager")
    for seed in range(3):
        x = normal(4, K, seed=seed)
        expected = copy.deepcopy(quantized).attn["q"](x)
        assert torch.equal(q(x), expected) and torch.equal(q(x), expected)
        quantized.attn["k"](normal(4, K, seed=seed + 10))


def test_a_copy_computes_with_its_own_weights() -> None:
    quantized, _ = install()
    copied = copy.deepcopy(quantized)
    for name in SIZES:
        copied.get_submodule(name).weight_scale *= 2
    x = normal(4, K, seed=8)
    expected = copied(x)
    assert not torch.equal(expected, quantized(x))
    assert torch.equal(torch.compile(copied, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_follow_the_inputs_dtype(dtype: torch.dtype) -> None:
    quantized, _ = install()
    x = normal(4, K, seed=8).to(dtype)
    found = torch.compile(quantized, fullgraph=True, backend="aot_eager")(x)
    assert found.dtype == dtype and torch.equal(found, quantized(x))


def test_autocast_changes_nothing() -> None:
    quantized, _ = install()
    x = normal(4, K, seed=8)
    expected = quantized(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_with_gradients_recorded_outputs_are_constants_as_in_eager_mode(training: bool) -> None:
    quantized, _ = install()
    quantized.train(training)
    with torch.enable_grad():
        x = normal(4, K, seed=8).requires_grad_()
        found = torch.compile(quantized, fullgraph=True, backend="aot_eager")(x)
        expected = quantized(x)
        assert torch.equal(found, expected) and not found.requires_grad and not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x.detach()), expected)


@pytest.mark.parametrize("group_inputs", [False, True])
def test_a_model_is_one_graph(group_inputs: bool, quantized: Callable[..., Path]) -> None:
    model, backend = load(quantized(group_inputs=group_inputs)), Compiled()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in (17, 23):
        ids = torch.randint(0, 200, (1, length), generator=torch.Generator().manual_seed(length))
        assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(backend.graphs) <= 2
    groups = sum(isinstance(module, modules.InputGroup) for module in model.modules())
    assert groups == (8 if group_inputs else 14) and backend.groups() == groups


def test_a_question_about_an_image_gives_the_same(quantized: Callable[..., Path]) -> None:
    """transformers' own code cannot be traced whole around this model's image encoder; its language model can."""
    folder = quantized(group_inputs=True)
    model, backend = load(folder), Compiled()
    inputs = small_batches("qwen2_vl", folder, 1)[0].inputs
    expected = model(**inputs).logits
    assert "pixel_values" in inputs
    model.model.language_model = torch.compile(model.model.language_model, fullgraph=True, backend=backend)
    assert torch.equal(model(**inputs).logits, expected)
    assert len(backend.graphs) == 1 and backend.groups() == 8


def test_generate_compiles_with_a_static_cache(quantized: Callable[..., Path]) -> None:
    folder = quantized(group_inputs=True)
    model, backend = load(folder), Compiled()
    inputs = small_batches("qwen2_vl", folder, 1)[0].inputs
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = model.generate(**inputs, **options)
    kept = lambda graph, inputs: backend(graph, inputs)  # noqa: E731  (of an object transformers would make a copy)
    config = CompileConfig(fullgraph=True, backend=kept, mode=None)
    config._compile_all_devices = True
    found = model.generate(**inputs, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert len(backend.graphs) == 1 and backend.groups() == 8
