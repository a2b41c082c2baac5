"""vLLM gives the tokens that `transformers` gives, for every family and kind of checkpoint; where it is installed."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import python
from tiny_models import FAMILIES, VISION_FAMILIES, tiny_image

from quant_experts import QuantExpertsError, QuantizationConfig, load, quantize
from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.config import RECIPES, SCOPES, Scheme
from quant_experts.demo import model_path
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.questions_file import EvaluationItem, demo_items
from quant_experts.runtime.processor import find_tokenizer, load_processor

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (see CONTRIBUTING.md)"),
    pytest.mark.timeout(1800),
]

PROGRAM = Path(__file__).parent / "serving_in_vllm.py"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "weight_std": 0.08}
"""vLLM's attention takes heads of 32 channels and more. Weights so large that each linear counts."""
DEFAULT = RECIPES["quant-experts"].to_json() | {"shared_rank": 8}
PAPER: dict[str, Any] = {}
TIED = {"cohere": {"tie_embeddings": True}}
"""vLLM has no head of its own for these, in full precision either."""
ALL = {"scopes": SCOPES}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{family}, {recipe}": (family, "W4A6", changes | TIED.get(family, {}))
        for recipe, changes in (("default", DEFAULT), ("paper", PAPER))
        for family in FAMILIES
    },
    "paper, one group": ("qwen2_vl", "W4A6", {"group_inputs": True}),
    **{
        f"{recipe}, {scheme}": ("qwen2_vl", scheme, changes)
        for recipe, changes in (("default", DEFAULT), ("paper", PAPER))
        for scheme in ("W3A16", "W4A16g128", "W4A16g64-asym", "W4A8g32-asym", "W4Afp8")
    },
    "tied": ("qwen2_vl", "W4A6", {"tie_embeddings": True}),
    **{f"{family}, all scopes": (family, "W3A16", DEFAULT | ALL) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "paper, all scopes": ("qwen2_5_vl", "W4A6", ALL),
    "vision only": ("qwen2_vl", "W4A6", DEFAULT | {"scopes": ("vision",)}),
    "merger only": ("qwen3_vl", "W4A6", DEFAULT | {"scopes": ("merger",)}),
    "vision and language": ("llava_onevision", "W4A6", DEFAULT | {"scopes": SCOPES[::2]}),
}
COMPILED = ("qwen2_vl, default", "qwen2_vl, paper", "qwen2_5_vl, all scopes", "default, W3A16")
REFUSED = {
    "vision of InternVL": ("internvl", {"scopes": ("vision",)}, r"no layer that could hold the quantized '.*q_proj'"),
    "merger of LLaVA": ("llava_onevision", {"scopes": ("merger",)}, r"could hold the quantized '.*linear_1'"),
}
DEMO = {("quant-experts", "W4A6"): 0.5, ("paper", "W4A6"): 0.5, ("quant-experts", "W3A16"): 1e-3}
"""(recipe, scheme) -> tolerance; where activations are not rounded nothing is one higher or lower."""
Found = dict[str, Any]


def served(jobs: list[Found], place: Path) -> list[Found]:
    """What the program answers."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = python(PROGRAM, place / "jobs.json", place / "answers.json", VLLM_LOGGING_LEVEL="ERROR")
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[Found] = json.loads((place / "answers.json").read_text())
    return answers


def prompts(folder: Path, asked: list[tuple[str, Any]], place: Path) -> list[tuple[str, str | None]]:
    """(question, image or None) -> (prompt, file of the image or None)"""
    processor, rendered = load_processor(folder), []
    for i, (question, image) in enumerate(asked):
        parts = ([{"type": "image"}] if image else []) + [{"type": "text", "text": question}]
        message = {"role": "user", "content": parts}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        path = str(place / f"{folder.name}-{i}.png") if image else None
        if image:
            image.save(path)
        rendered.append((text, path))
    return rendered


def assert_same(
    folder: Path, asked: list[tuple[str, Any]], job: Found, found: Found, *, tolerance: float = 0.05, whole: bool = True
) -> None:
    """`transformers` gives the same tokens, with the same logarithms of their probabilities within a tolerance.

    whole: go on after the end of an answer, where a trained model is undecided. Attention adds in another order, by
    which a code of an activation may come out one higher or lower: so much differ two ways of `transformers` itself.
    """
    assert "error" not in found, found["error"]
    dtype = getattr(torch, job["options"].get("dtype", "float32"))
    model, processor = load(folder, dtype=dtype), load_processor(folder)
    end = find_tokenizer(processor).eos_token_id
    model.generation_config.eos_token_id = None
    for (text, _), (_, image), tokens, steps in zip(
        job["prompts"], asked, found["tokens"], found["logprobs"], strict=True
    ):
        inputs = processor(text=[text], return_tensors="pt", **({"images": [image]} if image else {}))
        inputs.pop("token_type_ids", None)
        options = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
        with torch.inference_mode():
            expected = model.generate(**inputs, max_new_tokens=job["tokens"], **options)
        wanted = expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        length = len(wanted) if whole or end not in wanted else wanted.index(end) + 1
        assert tokens[:length] == wanted[:length]
        for token, step, logits in zip(wanted[:length], steps, expected.logits, strict=False):
            assert abs(step[str(token)] - logits[0].float().log_softmax(-1)[token]) < tolerance


@pytest.fixture(scope="module")
def tiny_runs(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """For each run its folder, what is asked, the job and the answers; those to be refused and compiled too."""
    place = tmp_path_factory.mktemp("served")
    chosen = {
        name: (quantized(family, scheme, **WIDE, **changes), family) for name, (family, scheme, changes) in RUNS.items()
    }
    chosen |= {name: (quantized(family, **WIDE, **changes), family) for name, (family, changes, _) in REFUSED.items()}
    runs: dict[str, Found] = {}
    for name, (folder, family) in chosen.items():
        asked: list[tuple[str, Any]] = [("What is on no picture?", None)]
        asked += [("What is on the picture?", tiny_image())] if family in VISION_FAMILIES else []
        job = dict(folder=str(folder), prompts=prompts(folder, asked, place), tokens=6, options={"enforce_eager": True})
        runs[name] = dict(folder=folder, asked=asked, job=job)
    for name in COMPILED:
        job = runs[name]["job"] | {"options": {"enforce_eager": False}}
        runs[f"{name}, compiled"] = runs[name] | {"job": job}
    for run, found in zip(runs.values(), served([run["job"] for run in runs.values()], place), strict=True):
        run["found"] = found
    return runs


@pytest.mark.parametrize("name", RUNS)
def test_vllm_gives_the_tokens_of_transformers(tiny_runs: dict[str, Found], name: str) -> None:
    run = tiny_runs[name]
    rounded = "A16" not in RUNS[name][1]
    assert_same(run["folder"], run["asked"], run["job"], run["found"], tolerance=0.05 if rounded else 1e-3)
    assert not run["found"]["operations"]


@pytest.mark.parametrize("tensor", ["self_attn.q_proj.weight_packed", "mlp.down_proj.shared_up"])
def test_a_wrong_tensor_would_be_noticed(tiny_runs: dict[str, Found], tmp_path: Path, tensor: str) -> None:
    """Rows of one tensor in another order."""
    run = tiny_runs["default, W3A16"]
    folder = Path(shutil.copytree(run["folder"], tmp_path / run["folder"].name))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith(f"layers.0.{tensor}")]:
            changed(key, lambda x: x.flip(0).contiguous())(tensors)
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        assert_same(folder, run["asked"], run["job"], run["found"], tolerance=1e-3)


def engine_and_config(*linears: str) -> tuple[Any, Any]:
    """The part of the plugin that knows vLLM, and a configuration with a group for each linear."""
    from quant_experts.runtime.vllm import engine

    groups = tuple(GroupSpec(linears=(linear,)) for linear in linears)
    config = CheckpointConfig(scheme=Scheme.parse("W4A6"), recipe=RECIPES["paper"], groups=groups)
    return engine, engine.QuantExpertsVllmConfig(config)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of vLLM's, when it is imported
@pytest.mark.parametrize("kind", ["llama4", "falcon", "bloom"])
def test_models_that_reorder_rows_are_refused(kind: str) -> None:
    _, config = engine_and_config("layers.0.mlp.down_proj")
    with pytest.raises(QuantExpertsError, match=f"vLLM reorders outputs of {kind}"):
        config.maybe_update_config("nowhere", hf_config=SimpleNamespace(model_type=kind))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_linear_whose_weight_vllm_wants_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, config = engine_and_config("layers.0.self_attn.kv_b_proj", "layers.0.self_attn.o_proj")
    parallel = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
    monkeypatch.setattr(engine, "LinearBase", torch.nn.Linear)
    monkeypatch.setattr(engine, "get_current_vllm_config", lambda: parallel)
    monkeypatch.setattr(engine, "get_tensor_model_parallel_world_size", lambda: 1)
    layer = torch.nn.Linear(2, 2)
    assert config.get_quant_method(layer, "layers.0.self_attn.o_proj").parts
    with pytest.raises(QuantExpertsError, match=r"needs the weight of '.*kv_b_proj' itself"):
        config.get_quant_method(layer, "layers.0.self_attn.kv_b_proj")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_outputs_without_a_bias_that_is_there_are_refused() -> None:
    engine, config = engine_and_config("layers.0.mlp.down_proj")
    method = engine.QuantExpertsLinearMethod(config, ())
    layer = torch.nn.Module()
    layer.add_module(engine.QUANTIZED, torch.nn.Identity())
    layer.prefix, layer.output_partition_sizes, layer.bias, layer.skip_bias_add = "down", [2], torch.zeros(2), False
    x = torch.ones(1, 2)
    assert torch.equal(method.apply(layer, x, layer.bias), x)
    with pytest.raises(QuantExpertsError, match="'down' without its bias"):
        method.apply(layer, x, None)
    layer.skip_bias_add = True
    assert torch.equal(method.apply(layer, x, None), x)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_gives_the_same(tiny_runs: dict[str, Found], name: str) -> None:
    run = tiny_runs[f"{name}, compiled"]
    assert_same(run["folder"], run["asked"], run["job"], run["found"])
    assert run["found"]["operations"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_computes_otherwise_is_refused(tiny_runs: dict[str, Found], name: str) -> None:
    error = tiny_runs[name]["found"].get("error", "loaded")
    assert re.match(f"QuantExpertsError: .*{REFUSED[name][2]}", error), error


def without(tensor: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(tensor)


def changed(tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({tensor: change(tensors[tensor])})


Q = "layers.0.self_attn.q_proj"
DAMAGE = {
    f"{Q}.weight_shape": (without, "is missing"),
    f"{Q}.weight_packed": (without, "is missing"),
    f"{Q}.input_group.smooth_scale": (without, "is missing"),
    "layers.1.mlp.up_proj.shared_up": (lambda name: changed(name, lambda x: x[:-1].contiguous()), "comes as"),
    "layers.1.mlp.up_proj.weight_scale": (lambda name: changed(name, lambda x: x * torch.nan), "holds NaN"),
}


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_tensor(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    jobs = []
    for i, (tensor, (damage, _)) in enumerate(DAMAGE.items()):
        folder = Path(shutil.copytree(quantized("qwen2_vl", **WIDE), tmp_path / str(i)))
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for key in [key for key in tensors if key.endswith(tensor)]:
                damage(key)(tensors)
                save_file(tensors, file, {"format": "pt"})
        jobs.append(dict(folder=str(folder), prompts=[("Hello", None)], tokens=1, options={"enforce_eager": True}))
    for (tensor, (_, message)), found in zip(DAMAGE.items(), served(jobs, tmp_path), strict=True):
        error = found.get("error", "loaded")
        assert re.match(rf"QuantExpertsError: Tensor '.*{re.escape(tensor)}' {message}", error), error


@pytest.mark.parametrize(
    "options, environment, message",
    [
        ({}, {"VLLM_PLUGINS": ""}, "Unknown quantization method: quant_experts"),
        (
            {"tensor_parallel_size": 2},
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            "start vLLM with tensor_parallel_size=1",
        ),
    ],
    ids=["without the plugin", "tensor parallel"],
)
def test_what_cannot_work_fails_at_the_start(
    quantized: Callable[..., Path], tmp_path: Path, options: Found, environment: dict[str, str], message: str
) -> None:
    """Of several processes the one that fails says why in its log."""
    job = dict(folder=str(quantized("qwen2_vl", **WIDE)), prompts=[("Hello", None)], tokens=1)
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"options": {"enforce_eager": True} | options}]))
    done = python(PROGRAM, tmp_path / "jobs.json", tmp_path / "answers.json", **environment)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert "error" in answers[0] and message in answers[0]["error"] + done.stdout + done.stderr


@pytest.fixture(scope="module")
def demo_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The bundled model, quantized."""
    folders = {key: tmp_path_factory.mktemp("demo") / "-".join(key) for key in DEMO}
    samples = [item.as_sample() for item in demo_items("calibration", 28)]
    for (recipe, scheme), folder in folders.items():
        config = QuantizationConfig.of(scheme, recipe, scale_with_width=True)
        quantize(model_path(), samples, folder, config, device="cpu")
    return folders


def test_the_demo_model_answers_the_same(demo_folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    asked = [(item.question, item.images[0] if item.images else None) for item in demo_items("tuning", 21)]
    jobs = [
        dict(folder=str(folder), prompts=prompts(folder, asked, tmp_path), tokens=8, options={"enforce_eager": True})
        for folder in demo_folders.values()
    ]
    default = ("quant-experts", "W4A6")
    jobs.append(jobs[0] | {"options": {"enforce_eager": True, "dtype": "bfloat16"}})
    for key, job, found in zip([*DEMO, default], jobs, served(jobs, tmp_path), strict=True):
        assert_same(demo_folders[key], asked, job, found, tolerance=DEMO[key], whole=False)


def test_the_openai_server_answers_the_same(demo_folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    folder = demo_folders["quant-experts", "W4A6"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        items = demo_items("tuning", 7)
        answers = [chat(f"http://127.0.0.1:{port}/v1/chat/completions", str(folder), item) for item in items]
    finally:
        server.terminate()
        server.wait()
    assert answers == generate_answers(load(folder), load_processor(folder), items, max_new_tokens=16)


def wait_for(address: str, server: Any, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def chat(address: str, model: str, item: EvaluationItem) -> str:
    parts: list[Found] = []
    for image in item.images:
        png = io.BytesIO()
        image.save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": item.question})
    body = dict(model=model, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=16)
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()
