import pytest
from torch import nn

from isw_plugin.errors import PatternError
from isw_plugin.sites.patterns import Patterns, select

NAMES = (
    "conv1",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer2.0.conv1",
    "layer2.0.downsample.0",
    "layer10.0.conv1",
    "fc",
)
LAYERS = {name: nn.Linear(1, 1) if name == "fc" else nn.Conv2d(1, 1, 1) for name in NAMES}

ROWS: list[tuple[Patterns, Patterns, tuple[str, ...]]] = [
    ("*", (), NAMES),
    ("fc", (), ("fc",)),
    (["fc", "conv1"], (), ("conv1", "fc")),
    (("fc", "fc"), (), ("fc",)),
    ("layer1.*", (), ("layer1.0.conv1", "layer1.0.conv2")),
    ("layer[12].*", (), ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.downsample.0")),
    ("layer?.0.conv1", (), ("layer1.0.conv1", "layer2.0.conv1")),
    ("*conv1", (), ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer10.0.conv1")),
    ("re:layer\\d+\\.0\\.conv1", (), ("layer1.0.conv1", "layer2.0.conv1", "layer10.0.conv1")),
    ("re:conv1", (), ("conv1",)),
    (["re:fc|conv1", "layer1.0.conv2"], (), ("conv1", "layer1.0.conv2", "fc")),
    ("*", "*downsample*", tuple(name for name in NAMES if "downsample" not in name)),
    ("*", ["fc", "re:layer.*"], ("conv1",)),
    (lambda name, module: isinstance(module, nn.Linear), (), ("fc",)),
    ("*", lambda name, module: isinstance(module, nn.Conv2d), ("fc",)),
]


@pytest.mark.parametrize(("layers", "exclude", "expected"), ROWS)
def test_patterns_select(layers: Patterns, exclude: Patterns, expected: tuple[str, ...]) -> None:
    assert select(LAYERS, layers, exclude) == expected


def test_patterns_tell_upper_from_lower_case() -> None:
    with pytest.raises(PatternError):
        select(LAYERS, "FC")


@pytest.mark.parametrize(
    ("layers", "exclude"),
    [
        ("layer3.*", ()),
        (["fc", "layer3.*"], ()),
        ("re:layer3.*", ()),
        ("*", "layer3.*"),
        ("*", ["fc", "layer3.*"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(layers: Patterns, exclude: Patterns) -> None:
    with pytest.raises(PatternError, match=r"layer3.*matches 0 of 7 layers"):
        select(LAYERS, layers, exclude)


def test_the_error_says_which_setting_it_was() -> None:
    with pytest.raises(PatternError, match="exclude='x'"):
        select(LAYERS, "*", "x")


@pytest.mark.parametrize(
    ("typo", "close"),
    [
        ("layer1.0.conv3", "layer1.0.conv2"),
        ("layer2.0.downsampel.0", "layer2.0.downsample.0"),
        ("re:layer1.0.cnv1", "layer1.0.conv1"),
    ],
)
def test_close_names_are_offered(typo: str, close: str) -> None:
    with pytest.raises(PatternError, match=f"Close names: .*{close}"):
        select(LAYERS, typo)


@pytest.mark.parametrize(("layers", "exclude"), [([], ()), ("fc", "fc"), ("*", "*"), (lambda *_: False, ())])
def test_selecting_nothing_is_an_error(layers: Patterns, exclude: Patterns) -> None:
    with pytest.raises(PatternError, match=r"selects \d of 7"):
        select(LAYERS, layers, exclude)


@pytest.mark.parametrize("setting", ["layers", "exclude"])
def test_a_malformed_expression_is_named(setting: str) -> None:
    patterns = {"layers": "*", "exclude": (), setting: "re:layer("}
    with pytest.raises(PatternError, match=r"'re:layer\(' is no regular expression"):
        select(LAYERS, patterns["layers"], patterns["exclude"])
