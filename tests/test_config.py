"""Schemes, recipes and configurations: what is read, what is refused, and that JSON loses nothing."""

import json
from itertools import product

import pytest
from pydantic import ValidationError

from quant_experts.config import PAPER_WIDTH, RECIPES, SCOPES, QuantizationConfig, Recipe, Scheme, find_recipe
from quant_experts.errors import QuantExpertsError

ALL_SCHEMES = [
    Scheme(weight_bits=w, activation_bits=a, group_size=g, symmetric=s)
    for w, a, g, s in product(range(2, 9), (4, 5, 6, 7, 8, 16), (None, 2, 64, 128, 129), (True, False))
] + [
    Scheme(weight_bits=w, activation_bits=8, group_size=g, symmetric=s, activation_format="fp8")
    for w, g, s in product(range(2, 5), (None, 2, 64, 128, 129), (True, False))
]
W4A8 = dict(weight_bits=4, activation_bits=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W4A6", (4, 6, None, True)),
        ("w4a8", (4, 8, None, True)),
        (" W2A4 ", (2, 4, None, True)),
        ("W4A8g128", (4, 8, 128, True)),
        ("W4A8G64-ASYM", (4, 8, 64, False)),
        ("W8A8-asym", (8, 8, None, False)),
        ("W4A6pc", (4, 6, None, True)),
        ("W3A16", (3, 16, 128, False)),
        ("W3A16g128", (3, 16, 128, False)),
        ("W4A16g64-sym", (4, 16, 64, True)),
        ("W4A16-sym", (4, 16, 128, True)),
        ("W4A16pc", (4, 16, None, False)),
        ("W4A16pc-sym", (4, 16, None, True)),
    ],
)
def test_scheme_text_means_what_the_table_says(text: str, expected: tuple) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.weight_bits, scheme.activation_bits, scheme.group_size, scheme.symmetric) == expected
    assert scheme.weight_only == (expected[1] == 16)
    assert Scheme.parse(scheme) is scheme


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W4Afp8", (4, None, True)),
        ("w3aFP8", (3, None, True)),
        ("W2Afp8g64", (2, 64, True)),
        ("W4Afp8pc-asym", (4, None, False)),
    ],
)
def test_fp8_activations(text: str, expected: tuple) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.weight_bits, scheme.group_size, scheme.symmetric) == expected
    assert (scheme.activation_bits, scheme.activation_format, scheme.weight_only) == (8, "fp8", False)


def test_integer_activations_are_not_written_and_fp8_ones_need_format_2() -> None:
    plain, fp8 = Scheme.parse("W4A8"), Scheme.parse("W4Afp8")
    assert plain.to_json() == W4A8 | dict(group_size=None, symmetric=True) and plain.format_version == 1
    assert fp8.to_json() == plain.to_json() | dict(activation_format="fp8") and fp8.format_version == 2
    assert QuantizationConfig.of("W4A8").to_json()["scheme"] == plain.to_json()


def test_every_scheme_has_its_own_text_and_is_read_back_from_it() -> None:
    texts = [str(scheme) for scheme in ALL_SCHEMES]
    assert len(set(texts)) == len(ALL_SCHEMES)
    assert [Scheme.parse(text) for text in texts] == ALL_SCHEMES
    assert [Scheme.parse(text.lower()) for text in texts] == ALL_SCHEMES
    assert {str(Scheme.parse(t)) for t in ("W4A6", "W4A8", "W3A16")} == {"W4A6", "W4A8", "W3A16"}


MISSPELT = ["", "W4", "A8W4", "W4A", "WA8", "W4 A6", "W-4A6", "W4.5A6", "xW4A6", "W4A6x", "W4A6-", "W4A6-symm"]
BAD_BITS = ["W1A8", "W9A8", "W0A8", "W16A16", "W4A3", "W4A9", "W4A15", "W4A17", "W4A32"]
BAD_FP8 = ["W5Afp8", "W8Afp8", "W1Afp8", "W4Afp6", "W4Afp", "W4A8fp8", "Wfp8Afp8", "W4Afp8g1"]
BAD_GROUPS = ["W4A6g0", "W4A6g1", "W4A6g-1", "W4A6g", "W4A6g128pc", "W4A6-sym-asym"]


@pytest.mark.parametrize("text", MISSPELT + BAD_BITS + BAD_FP8 + BAD_GROUPS)
def test_unknown_scheme_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(QuantExpertsError, match=r"scheme|Invalid Scheme") as caught:
        Scheme.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [*ALL_SCHEMES[::37], *RECIPES.values(), Recipe(name="x", exempt="magnitude", important_channels=3, shared_rank=5)]
    + [QuantizationConfig.of("W3A16g64", name, seed=3, samples=5, max_tokens=7, max_pixels=11) for name in RECIPES],
    ids=str,
)
def test_json_round_trip(value: Scheme | Recipe | QuantizationConfig) -> None:
    text = json.dumps(value.to_json())
    assert type(value).from_json(json.loads(text)) == value


@pytest.mark.parametrize(
    ("kind", "entries", "named"),
    [
        (Scheme, W4A8 | dict(groupsize=3), "groupsize"),
        (Scheme, dict(activation_bits=8), "weight_bits"),
        (Scheme, W4A8 | dict(weight_bits=1), "weight_bits"),
        (Scheme, W4A8 | dict(weight_bits=4.5), "weight_bits"),
        (Scheme, W4A8 | dict(activation_bits=12), "activation_bits"),
        (Scheme, W4A8 | dict(group_size=1), "group_size"),
        (Scheme, W4A8 | dict(activation_format="bf8"), "activation_format"),
        (Scheme, W4A8 | dict(activation_format="fp8", activation_bits=6), "activation_bits is 6; fp8"),
        (Scheme, W4A8 | dict(activation_format="fp8", weight_bits=5), "weight_bits is 5; with fp8"),
        (Recipe, dict(name="x", rank=3), "rank"),
        (Recipe, dict(shared_rank=3), "name"),
        (Recipe, dict(name="x", exempt="some"), "exempt"),
        (Recipe, dict(name="x", exempt="frequency"), "shared_rank"),
        (Recipe, dict(name="x", smoothing="exempt"), "set exempt"),
        (Recipe, dict(name="x", rotation=48), "power of two"),
        (Recipe, dict(name="x", rotation=64, exempt="frequency", shared_rank=8), "set exempt to none"),
        (Recipe, dict(name="x", rotation=64, routed_rank=8), "set routed to tokens"),
        (Recipe, dict(name="x", factor_bits=4), "factor_bits"),
        (Recipe, dict(name="x", shared_rank=8, shared_reads="codes"), "needs factor_bits 8"),
        (Recipe, dict(name="x", shared_rank=8, factor_bits=8, routed_rank=8, shared_reads="codes"), "no routed"),
        (
            Recipe,
            dict(name="x", shared_rank=8, factor_bits=8, exempt="frequency", shared_reads="codes"),
            "exempt channels are rebuilt",
        ),
        (Recipe, dict(name="x", shared_rank=-1), "shared_rank"),
        (Recipe, dict(name="x", refine=True), "routed_rank"),
        (Recipe, dict(name="x", num_experts=0), "num_experts"),
        (Recipe, dict(name="x", num_experts=129), "num_experts"),
        (Recipe, dict(name="x", important_channels=0), "important_channels"),
        (QuantizationConfig, dict(scheme=W4A8 | dict(bits=4), recipe=dict(name="x")), "scheme.bits"),
        (QuantizationConfig, dict(scheme=W4A8), "recipe"),
    ],
)
def test_bad_entries_are_named(kind: type, entries: dict, named: str) -> None:
    with pytest.raises(QuantExpertsError) as caught:
        kind.from_json(entries)
    assert named in str(caught.value) and kind.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limits", [{"seed": -1}, {"samples": 0}, {"max_tokens": 0}, {"max_pixels": 0}, {"sample": 3}])
def test_bad_limits_are_named(limits: dict) -> None:
    with pytest.raises(QuantExpertsError, match=next(iter(limits))):
        QuantizationConfig.of(**limits)


def test_configurations_cannot_be_changed() -> None:
    config = QuantizationConfig.of()
    for value, key in ((config.scheme, "weight_bits"), (config.recipe, "name"), (config, "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, key, getattr(value, key))


def test_recipes_are_found_by_name() -> None:
    assert all(find_recipe(name).name == name and find_recipe(recipe) is recipe for name, recipe in RECIPES.items())
    with pytest.raises(QuantExpertsError, match="papier") as caught:
        find_recipe("papier")
    assert all(name in str(caught.value) for name in RECIPES)


def test_paper_recipe_holds_the_papers_numbers() -> None:
    paper, rtn = RECIPES["paper"], RECIPES["rtn"]
    assert (paper.important_channels, paper.num_experts, paper.shared_rank, paper.routed_rank) == (32, 8, 32, 32)
    assert (paper.exempt, paper.group_inputs) == ("frequency", False)
    assert (rtn.exempt, rtn.shared_rank, rtn.routed_rank) == ("none", 0, 0)


@pytest.mark.parametrize("width", [1, 64, 448, 1000, 1536, 2048, 3584, 8192])
def test_at_width_gives_the_nearest_positive_multiple_of_eight(width: int) -> None:
    recipe = QuantizationConfig.of("W4A6", "paper", scale_with_width=True).recipe.model_copy(
        update=dict(shared_rank=52)
    )
    scaled = recipe.at_width(width)
    for key in ("important_channels", "shared_rank", "routed_rank"):
        exact, value = getattr(recipe, key) * width / PAPER_WIDTH, getattr(scaled, key)
        assert value % 8 == 0 and value >= 8
        assert value == 8 or abs(value - exact) <= 4
    assert scaled.num_experts == recipe.num_experts and scaled.exempt == recipe.exempt
    assert scaled.at_width(width * 3) == scaled


def test_at_width_keeps_what_is_absent_or_absolute() -> None:
    assert RECIPES["paper"].at_width(4096) is RECIPES["paper"]
    rtn = RECIPES["rtn"].model_copy(update=dict(scale_with_width=True)).at_width(4096)
    assert (rtn.shared_rank, rtn.routed_rank) == (0, 0)
    paper = RECIPES["paper"].model_copy(update=dict(scale_with_width=True)).at_width(PAPER_WIDTH)
    assert paper == RECIPES["paper"]


def test_scopes_are_a_set_and_the_default_is_not_written() -> None:
    plain = QuantizationConfig.of("W4A6")
    assert plain.scopes == ("language",) and "scopes" not in plain.to_json()
    assert QuantizationConfig.from_json(plain.to_json()) == plain
    every = QuantizationConfig.of("W4A6", scopes=["language", "vision", "merger", "vision"])
    assert every.scopes == SCOPES == ("vision", "merger", "language")
    assert every.to_json()["scopes"] == list(SCOPES)
    assert QuantizationConfig.from_json(json.loads(json.dumps(every.to_json()))) == every


@pytest.mark.parametrize(("scopes", "said"), [(["head"], "'vision', 'merger' or 'language'"), ([], "at least 1 item")])
def test_scopes_that_do_not_exist_are_refused(scopes: list[str], said: str) -> None:
    with pytest.raises(QuantExpertsError, match=f"Invalid QuantizationConfig: scopes.*{said}"):
        QuantizationConfig.of("W4A6", scopes=scopes)
