"""Questions about written things: ``document`` (small key-value pages) and ``text`` (no picture at all)."""

from collections.abc import Callable
from random import Random

from quant_experts.demo.rendering import SIDE, Page, font
from quant_experts.demo.scenes import GLYPHS, Drawn


def _code(rng: Random) -> str:
    return "".join(rng.choices(GLYPHS, k=rng.randint(8, 11)))


def _date(rng: Random) -> str:
    return f"{rng.randint(1980, 2049)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _amount(rng: Random) -> str:
    return f"{rng.randint(100, 99999)}.{rng.randint(0, 99):02}"


def _phone(rng: Random) -> str:
    return f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}-{rng.randint(10, 99)}"


_FIELDS: dict[str, Callable[[Random], str]] = {
    "Invoice": _code,
    "Date": _date,
    "Total": _amount,
    "Phone": _phone,
    "Order": _code,
    "Due": _date,
    "Tax": _amount,
    "Serial": _code,
    "Account": _phone,
    "Batch": _code,
    "Expires": _date,
    "Fax": _phone,
}


def document(rng: Random) -> Drawn:
    """A label of five to seven fields in a small font: the value of one."""
    page = Page(rng, contrast=(90, 220), noise=0.18)
    names = rng.sample(sorted(_FIELDS), rng.randint(5, 7))
    face = font(rng.randint(9, 12))
    pitch = rng.uniform(17, (SIDE - 8) / len(names))
    x, y = rng.uniform(3, 14), rng.uniform(2, SIDE - 4 - pitch * len(names))
    indent = x + max(face.getlength(f"{name}: ") for name in names) if rng.random() < 0.5 else None
    values = {name: _FIELDS[name](rng) for name in names}
    for index, (name, value) in enumerate(values.items()):
        line = y + pitch * index
        page.draw.text((x, line), f"{name}:", font=face, fill=page.ink)
        start = indent if indent is not None else x + face.getlength(f"{name}: ")
        page.draw.text((start, line), value, font=face, fill=page.ink)
    name = rng.choice(names)
    return page.finish(), f"What is the value of {name}?", values[name]


def _letters(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(low, high)))


def text(rng: Random) -> tuple[str, str]:
    """A small exercise on a string: the question and its answer."""
    task = rng.choice(("reverse", "sort", "add", "replace"))
    if task == "reverse":
        word = _letters(rng, 8, 14)
        return f"Reverse {word}", word[::-1]
    if task == "sort":
        digits = "".join(rng.choices("0123456789", k=rng.randint(8, 12)))
        return f"Sort {digits}", "".join(sorted(digits))
    if task == "add":
        first, second = rng.randint(1000, 99999), rng.randint(1000, 99999)
        return f"Add {first} and {second}", str(first + second)
    word = _letters(rng, 9, 14)
    old, new = rng.choice(word), rng.choice("0123456789")
    return f"Replace {old} by {new} in {word}", word.replace(old, new)
