"""Imports point downwards only, and importing the package costs nothing."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quant_experts

ROOT = Path(quant_experts.__file__).parent
LAYERS = [
    *({"__main__"}, {"cli"}, {"report"}, {"evaluation"}, {"pipeline"}, {"scale_search"}, {"group"}),
    {"calibration", "quantizers", "experts"},
    *({"runtime"}, {"checkpoint"}, {"kernels"}, {"artifacts"}, {"config"}, {"errors"}, {"demo"}),
]
"""From the top down. A part imports itself and the layers below its own, so parts of one layer never each other."""
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(ROOT.rglob("*.py"))


def is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below a node, in functions too, but for those of type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from ((child.lineno, f"{child.module}.{alias.name}") for alias in child.names)
        elif is_type_checking(child):
            yield from imports(ast.Module(child.orelse, []))
        else:
            yield from imports(child)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def run(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_part_has_its_layer() -> None:
    assert len(FILES) > 20
    assert {part_of(path) for path in FILES} <= {*DEPTH, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    found = list(imports(ast.parse(path.read_text())))
    if path.name == "__init__.py":
        # The demo's questions are its public face, the program is that of the commands.
        allowed = f"quant_experts.{part}." if part in ("demo", "cli") else "nothing"
        foreign = [name for _, name in found if name.partition(".")[0] not in sys.stdlib_module_names]
        assert not [name for name in foreign if not name.startswith(allowed)]
        return
    for line, name in found:
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "quant_experts" and target not in (part, "__version__"):
            assert target in DEPTH, f"{path}:{line} imports {name}"
            assert DEPTH[target] > DEPTH[part], f"{path}:{line} imports {name}, which is not below {part}"


def test_a_wrong_import_would_be_seen() -> None:
    code = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from c import d, e\n"
    assert list(imports(ast.parse(code))) == [(4, "b"), (6, "c.d"), (6, "c.e")]


@pytest.mark.parametrize("module", ["quant_experts", "quant_experts.runtime.autoload", "quant_experts.errors"])
def test_importing_costs_nothing(module: str) -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "sklearn", "safetensors", "quant_experts.config")
    run(f"import sys, {module}; found = [m for m in {heavy} if m in sys.modules]; assert not found, found")


def test_the_runtime_needs_no_calibration_and_no_experts() -> None:
    paths = [path for path in (ROOT / "runtime").rglob("[!_]*.py") if path.name != "engine.py"]  # that needs vLLM
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths]
    assert {"quant_experts.runtime.modules", "quant_experts.runtime.vllm.plugin"} <= set(names)
    above = [f"quant_experts.{part}" for part, depth in DEPTH.items() if depth < DEPTH["runtime"]]
    run(
        "import importlib, sys\n"
        f"sys.modules |= dict.fromkeys({[*above, 'greenlet']})\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )


def test_public_names_are_found() -> None:
    assert set(quant_experts.__all__) >= {"quantize", "load", "QuantizationConfig", "Scheme", "Recipe", "__version__"}
    assert quant_experts.Scheme is __import__("quant_experts.config", fromlist=["Scheme"]).Scheme
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = quant_experts.nothing_here
