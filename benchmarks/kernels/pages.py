"""Parts of a page that are made of stored results: between `<!-- NAME: PART -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping


def markdown(heads: list[str], lines: Iterable[list[str]], names: int = 1) -> str:
    """A table whose first columns, so many, are names."""
    rule = ["---"] * names + ["---:"] * (len(heads) - names)
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, rule, *lines))


def filled(page: str, name: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page with each of its parts of that name made anew. Ends the program with a sentence where one is unknown, or
    there is none."""
    marked = re.compile(rf"(<!-- {name}: (\w+) -->\n).*?(<!-- {name}: end -->)", re.DOTALL)

    def made(match: re.Match[str]) -> str:
        if match[2] not in parts:
            sys.exit(f"<!-- {name}: {match[2]} -->: no such part, choose from {', '.join(parts)}.")
        return f"{match[1]}{parts[match[2]]()}{match[3]}"

    new, count = marked.subn(made, page)
    if not count:
        sys.exit(f"No part of the page begins with <!-- {name}: PART --> and ends with <!-- {name}: end -->.")
    if page.count(f"<!-- {name}:") != 2 * count or new.count(f"<!-- {name}:") != 2 * count:
        sys.exit(f"A part of the page does not begin with a line <!-- {name}: PART -->, or ends without its mark.")
    return new
