"""One drawing as SVG text. No pyplot and no settings left behind; the same drawing always gives the same bytes.

Drawings are small with comparatively large type and scaled by the page, so that they can be read on a phone too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quant-experts",
    # A dollar sign in a name is a dollar sign.
    "text.parse_math": False,
    "font.size": 8.0,
    "axes.edgecolor": "#5F6B7A",
    "axes.labelcolor": "#1F2933",
    "xtick.color": "#3E4C59",
    "ytick.color": "#3E4C59",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
}
_SIZE = (3.8, 2.5)
_NO_METADATA: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def drawing(draw: Callable[[Axes], None], name: str, description: str, inches: tuple[float, float] = _SIZE) -> str:
    """What `draw` does to a pair of axes under our settings, as an element of a page; the process's settings are back
    afterwards. name: begins the ids within it. description: for those who cannot see it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    return _inline(text.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    """An SVG document as an element of an HTML page: no prologue, ids of its own, a size that the page decides."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    body = svg[svg.index(">", view.end()) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    # Hundredths of a point are more than a screen shows; labels, which follow a ">", stay as they are.
    body = re.sub(r'(?<=[\s"(-])(\d+\.\d\d)\d+', r"\1", body)
    body = re.sub(r'(?<= )id="', f'id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = body.replace("xlink:href=", "href=")
    return f'<svg {view[0]} role="img" aria-label="{escape(description)}">{body.strip()}'
