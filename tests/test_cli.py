"""The commands, as a user calls them. What each refuses is in test_bad_input.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import python, small_samples, write_samples
from typer.testing import CliRunner

import quant_experts
from quant_experts import cli, load

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Two questions with images, as calibration samples and as questions to score."""
    return write_samples(tmp_path, small_samples("qwen2_vl", 2))


def run(*arguments: object) -> str:
    """stdout of a command that succeeds."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_version() -> None:
    assert run("--version").strip() == quant_experts.__version__


@pytest.mark.parametrize("module", ["quant_experts", "quant_experts.cli"])
def test_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, quant_experts.__version__)


def test_an_interrupt_before_a_command_begins_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")  # what Ctrl-C does while it is imported
    there = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "quant_experts"], capture_output=True, text=True, env=there)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Interrupted before anything had begun.\n"


def test_every_command_is_covered_here() -> None:
    assert sorted(COMMANDS) == ["ask", "compare", "demo", "eval", "inspect", "quantize"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    text = run(*([command] if command else []), "--help")
    assert "Usage:" in text and command in text
    documented = ["quantize", "demo", "compare", "eval", "ask", "inspect"] if not command else ["--json"]
    assert all(word in text for word in documented)


def test_no_arguments_show_help_and_a_wrong_option_is_named() -> None:
    assert "Usage:" in CliRunner().invoke(cli.app, []).output
    wrong = CliRunner().invoke(cli.app, ["quantize", "a", "b", "c", "--colour", "red"])
    assert wrong.exit_code == 2 and "--colour" in wrong.output


def test_quantize_json(tiny: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    given = [
        "quantize",
        tiny("qwen2_vl"),
        samples,
        tmp_path / "out",
        "--scheme",
        "W4A8",
        "--recipe",
        "aser",
        "--scale-ranks",
    ]
    summary = json.loads(run(*given, "--seed", 3, "--limit", 1, "--json"))
    assert summary.keys() == {
        "output", "scheme", "recipe", "bits_per_weight", "samples", "tokens", "seconds", "resumed_blocks",
        "estimated_bytes", "peak_bytes", "events",
    }  # fmt: skip
    assert summary["output"] == str(tmp_path / "out") and summary["scheme"] == "W4A8" and summary["recipe"] == "aser"
    assert summary["samples"] == 1 and summary["tokens"]["image"] == 9 and 4 < summary["bits_per_weight"] < 16
    assert any("one sample only" in event for event in summary["events"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["seed"] == 3 and config["scheme"]["activation_bits"] == 8
    assert {group["shared_rank"] for group in config["groups"]} == {8}
    assert load(tmp_path / "out")


def test_quantize_to_fp8_activations_and_inspect(tiny: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    text = run("quantize", tiny("qwen2_vl"), samples, tmp_path / "out", "--scheme", "w4afp8")
    assert "W4Afp8, recipe quant-experts" in " ".join(text.split())
    found = json.loads(run("inspect", tmp_path / "out", "--json"))
    assert found["scheme"] == "W4Afp8" and found["format_version"] == 2
    assert "W4Afp8, recipe quant-experts, format 2" in " ".join(run("inspect", tmp_path / "out").split())


def test_quantize_speaks_to_people(tiny: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    text = run("quantize", tiny("qwen2_vl"), samples, tmp_path / "out", "--recipe", "rtn")
    assert "stored bits per weight" in text and "W4A6" in text and "2 samples" in text


@pytest.mark.parametrize(("recipe", "larger"), [("paper", True), ("rtn", False)])
def test_quantize_says_when_experts_outgrow_the_layers(
    tiny: Callable[..., Path], samples: Path, tmp_path: Path, recipe: str, larger: bool
) -> None:
    arguments = ["quantize", tiny("qwen2_vl"), samples, tmp_path / "out", "--recipe", recipe]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    note = "more than the 16 bits of a weight in full precision"
    assert result.exit_code == 0 and (note in " ".join(result.stderr.split())) == larger


def test_eval(quantized: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.jsonl"
    options = ["--max-new-tokens", 3, "--device", "cpu", "--predictions", predictions]
    found = json.loads(run("eval", quantized(), samples, *options, "--json"))
    assert found["questions"] == 2 and found["scores"]["average"]["count"] == 2
    assert {"mean", "low", "high"} <= found["scores"]["average"].keys()
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["question"] for line in lines] == [sample.question for sample in small_samples("qwen2_vl", 2)]
    assert all(isinstance(line["prediction"], str) and line["score"] in (0, 1) for line in lines)
    table = run("eval", quantized(), samples, "--max-new-tokens", 1, "--limit", 1, "--scorer", "anls")
    assert "average" in table and "anls" in table


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2"])
def test_ask(quantized: Callable[..., Path], samples: Path, family: str) -> None:
    images = ["--image", samples.parent / "0.png", "--image", samples.parent / "1.png"] if family == "qwen2_vl" else []
    asked = ["ask", quantized(family), "What is [bold]this[/]?", *images, "--max-new-tokens", 4]
    answer = json.loads(run(*asked, "--json"))["answer"]
    # A random model says anything; what would steer a terminal is shown as a replacement character.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in answer)
    assert isinstance(answer, str) and " ".join(run(*asked).split()) == " ".join(shown.split())


def test_ask_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_experts.demo.questions import questions

    question = next(q for q in questions("tuning", 20) if q.image is not None and len(q.answer) <= 3)
    assert question.image is not None
    question.image.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    given = json.loads(run("ask", "demo", question.question, "--image", "picture.png", "--max-new-tokens", 8, "--json"))
    assert given["answer"].strip()


def test_inspect(quantized: Callable[..., Path]) -> None:
    found = json.loads(run("inspect", quantized(), "--json"))
    assert found["scheme"] == "W4A6" and found["format_version"] == 1 and len(found["groups"]) == 14
    weights = {tuple(g["shape"]) for g in found["groups"]}
    assert weights == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert all(0 < group["error"] < 1 and group["experts"] == 4 for group in found["groups"])
    text = run("inspect", quantized())
    assert "W4A6" in text and "14 groups" in text


def test_demo(tmp_path: Path) -> None:
    few = ["--questions", 10, "--samples", 3, "--recipes", "rtn", "--schemes", "W4A6"]
    found = json.loads(run("demo", "--output", tmp_path / "demo", *few, "--json"))
    assert Path(found["report"]) == tmp_path / "demo" / "report.html"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "W4A6" in page and "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert load(tmp_path / "demo" / "rtn-W4A6")
    checkpoint = tmp_path / "demo" / "rtn-W4A6" / "config.json"
    written = checkpoint.stat().st_mtime_ns
    assert "rtn" in run("demo", "--output", tmp_path / "demo", *few)
    assert checkpoint.stat().st_mtime_ns == written, "a finished checkpoint is used again"


def test_scopes_are_given_on_the_command_line(tiny: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    given = ["quantize", tiny("qwen2_vl"), samples, tmp_path / "out", "--recipe", "rtn", "--scopes", "merger,vision"]
    json.loads(run(*given, "--json"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all("visual" in linear for group in config["groups"] for linear in group["linears"])
    compared = ["compare", tiny("qwen2_vl"), "--samples", samples, "--questions", samples, "--device", "cpu"]
    compared += ["--methods", "rtn", "--max-new-tokens", 2, "--output", tmp_path / "compared"]
    compared += ["--controls", "text-only", "--control-of", "rtn"]
    found = json.loads(run(*compared, "--scopes", "merger,language", "--json"))
    assert [row["label"] for row in found["rows"]] == ["full precision", "rtn W4A6"], "text calibrates no merger"
    assert "--scopes merger,language" in found["command"]


def test_compare_a_model_of_the_users(tiny: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    given = ["compare", tiny("qwen2_vl"), "--samples", samples, "--questions", samples, "--device", "cpu"]
    given += ["--methods", "rtn,aser", "--max-new-tokens", 2, "--output", tmp_path / "out", "--controls", "text-only"]
    found = json.loads(run(*given, "--json"))
    assert [row["label"] for row in found["rows"]] == [
        *("full precision", "rtn W4A6", "aser W4A6", "aser, text-only calibration W4A6")
    ]
    assert "--methods rtn,aser" in found["command"] and "--limit" not in found["command"]
    assert Path(found["report"]).is_file()
    text = run(*given, "--figures", tmp_path / "figures")
    assert {"accuracy0.svg", "errors0.svg", "channels0.svg"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    assert "Layer errors and what a token costs" in text and "text-only" in text


@pytest.mark.parametrize(
    "given", [["--schemes", "W4A99"], ["--methods", "magic"], ["--controls", "magic"], ["--control-of", "aser"]]
)
def test_compare_checks_before_it_works(tmp_path: Path, given: list[object]) -> None:
    options = ["--output", tmp_path / "out", "--limit", 7, "--sample-limit", 2, "--methods", "rtn", "--controls", "all"]
    with pytest.raises(quant_experts.QuantExpertsError):
        run("compare", "demo", *options, *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["--schemes", "W4A99"], ["--recipes", "magic"], ["--split", "secret"], ["--questions", 1]]
)
def test_demo_checks_before_it_works(tmp_path: Path, given: list[object]) -> None:
    with pytest.raises(quant_experts.QuantExpertsError):
        run("demo", "--output", tmp_path / "demo", *given)
    assert not (tmp_path / "demo").exists()


def test_interrupting_gives_130_and_the_next_call_goes_on(
    tiny: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    """A real process gets a real SIGINT once its first block is on disk."""
    waiting = (
        # A shell's background jobs ignore SIGINT, and so would their children.
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from quant_experts import cli, pipeline\nblocks = pipeline._Run._quantize_block\n"
        "def slow(self, stream, block, index, **more):\n"
        "    if index:\n        print('one block', flush=True)\n        time.sleep(200)\n"
        "    return blocks(self, stream, block, index, **more)\n"
        "pipeline._Run._quantize_block = slow\ncli.main()\n"
    )
    arguments = ["quantize", str(tiny("qwen2_vl")), str(samples), str(tmp_path / "out"), "--recipe", "rtn"]
    command = [sys.executable, "-c", waiting, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "one block\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert (
        errors.strip().splitlines()[-1].startswith("Interrupted; the same call goes on") and "Traceback" not in errors
    )
    assert not (tmp_path / "out").exists()
    assert json.loads(run(*arguments, "--json"))["resumed_blocks"] == 1


def test_help_is_quick_to_import() -> None:
    """Help and version need neither torch nor transformers."""
    code = (
        "import sys; from quant_experts import cli; assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    done = python(code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
