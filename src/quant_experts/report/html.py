"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.comparison import Comparison


def load_renderer() -> Callable[[Comparison], str]:
    """What turns a comparison into a page. Call it before long work whose result is to be reported.

    Raises `QuantExpertsError` if the optional libraries are missing.
    """
    try:
        from quant_experts.report.page import render
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        raise QuantExpertsError(f"The HTML report needs '{error.name}': install quant-experts[report].") from error
    return render


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write the report to `path` and return it. The file appears whole or not at all.

    Raises `QuantExpertsError` if the optional libraries are missing or the file cannot be written.
    """
    render = load_renderer()
    # A lone surrogate, which a damaged answer can hold, has no UTF-8 form.
    page = render(comparison).encode("utf-8", errors="replace")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page)
        os.replace(partial, path)
    except OSError as error:
        raise QuantExpertsError(f"The report cannot be written to '{path}': {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return path
