"""A checkpoint loads wherever the package is installed, imported or not, and fails loudly where it is not."""

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import python

from quant_experts import load

SITE = sysconfig.get_paths()["purelib"]
LOAD = (
    "import sys, torch\n"
    "from transformers import AutoModelForImageTextToText\n"
    "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
)
SAVE = "from safetensors.torch import save_file\nsave_file(dict(model.state_dict()), sys.argv[2])\n"


@pytest.fixture(scope="module")
def saved_again(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("again")
    load(quantized()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["written by quantize", "written by save_pretrained", "another scope"])
def test_without_the_package_loading_fails(quantized: Callable[..., Path], saved_again: Path, which: str) -> None:
    folder = quantized() if which == "written by quantize" else saved_again
    guarded = "q_proj.weight"
    if which == "another scope":
        folder, guarded = quantized("qwen3_vl", scopes=("merger",), routed_rank=0), "linear_fc1.weight"
    no_package = "import importlib.util\nassert importlib.util.find_spec('quant_experts') is None\n"
    done = python(no_package + LOAD + "print('loaded')", folder, flags=["-S"], PYTHONPATH=SITE)
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "find_spec" not in done.stderr and guarded in done.stderr, done.stderr


def test_installed_is_enough(quantized: Callable[..., Path], tmp_path: Path) -> None:
    unimported = "import sys\nassert not {'quant_experts.config', 'torch'} & set(sys.modules)\n"
    done = python(unimported + LOAD + SAVE, quantized(), tmp_path / "state", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "state")
    expected = load(quantized()).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def test_starting_an_interpreter_costs_nothing() -> None:
    """The module that every start imports brings the standard library only."""
    done = python("import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))", PYTHONPATH="")
    loaded = set(done.stdout.split())
    assert done.returncode == 0 and not done.stderr and "quant_experts" in loaded
    assert {name for name in loaded if not name.startswith(("_", "quant_experts"))} <= sys.stdlib_module_names | {
        name for name in loaded if name.startswith("sphinxcontrib") or name in ("sitecustomize", "usercustomize")
    }


@pytest.mark.parametrize(
    "code",
    [
        "import quant_experts.runtime.autoload",
        "import importlib.util; assert importlib.util.find_spec('transformers') is None",
        "import json, email, concurrent.futures",
    ],
)
def test_an_interpreter_without_transformers_is_not_harmed(tmp_path: Path, code: str) -> None:
    """Nothing but the package on the path, imported as its .pth file does."""
    source = Path(__file__).parents[2] / "src"
    done = python(f"import quant_experts.runtime.autoload\n{code}\nprint('fine')", flags=["-S"], PYTHONPATH=str(source))
    assert done.stdout == "fine\n" and not done.stderr


def test_a_package_that_is_broken_or_gone_does_not_stop_an_interpreter(tmp_path: Path) -> None:
    """Uninstalled by hand, its .pth left behind: Python itself says so on stderr and goes on."""
    (tmp_path / "quant_experts.pth").write_text((Path(__file__).parents[2] / "src" / "quant_experts.pth").read_text())
    code = f"import site; site.addsitedir({str(tmp_path)!r}); print('fine')"
    done = python(code, flags=["-S"], PYTHONPATH="")
    assert done.returncode == 0 and done.stdout == "fine\n"
    assert "quant_experts" in done.stderr


def test_the_hook_is_there_when_transformers_was_imported_first() -> None:
    code = (
        "import transformers.processing_utils, transformers.quantizers.auto as auto\n"
        "assert 'quant_experts' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'quant_experts' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "import importlib, quant_experts.runtime.autoload as again\n"
        "importlib.reload(again)\n"
        "import sys; assert not any(type(f).__module__ == again.__name__ for f in sys.meta_path)\n"
        "assert auto.__spec__.loader is not None and auto.__loader__.get_source(auto.__name__)\n"
    )
    done = python(code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_a_hook_that_cannot_load_leaves_transformers_alone() -> None:
    """Another transformers may lack what our hook needs; programs that do not use us must see a warning at most."""
    code = (
        "import sys\nsys.modules['quant_experts.runtime.transformers_hook'] = None\n"
        "import transformers.quantizers.auto as auto\nassert 'gptq' in auto.AUTO_QUANTIZER_MAPPING\n"
    )
    done = python(code, flags=["-W", "default"], PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "quant-experts does not work with this transformers" in done.stderr


def test_asking_where_the_module_is_does_not_use_up_the_finder() -> None:
    code = (
        "import importlib.util\nassert importlib.util.find_spec('transformers.quantizers.auto')\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\nprint('quant_experts' in known)\n"
    )
    done = python(code, PYTHONPATH="")
    assert done.stdout.split() == ["True"], done.stderr
