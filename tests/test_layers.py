"""Blocks by a ranking, by their kind, and all of them: what `SingleLayerConfig`, `--layer` and `--layers` take."""

import json

import pytest
from tuner.helpers import wrap

from models import build, build_architecture
from peft_onelayer.layers import check_layers, resolve_layers

KINDS = ["linear_attention", "full_attention"] * 4


@pytest.fixture
def ranking(tmp_path):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({"num_layers": 8, "order": [3, 1, 7, 0, 5, 2]}))
    return path


def test_of_a_ranking(ranking, tmp_path):
    assert resolve_layers(f"top-3@{ranking}", 8) == [1, 3, 7]
    assert resolve_layers(f"worst-2@{ranking}", 8) == [2, 5]
    assert resolve_layers(f"top-1@{ranking},6", 8) == [3, 6]
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"num_layers": 4, "contribution": [0.5, None, 1.0, 0.75]}))
    assert resolve_layers(f"top-2@{published}", 4) == [2, 3]
    assert resolve_layers(f"worst-1@{published}", 4) == [0]


def test_of_a_kind_and_all():
    assert resolve_layers("full_attention", 8, KINDS) == [1, 3, 5, 7]
    assert resolve_layers("linear_attention", 8, KINDS) == [0, 2, 4, 6]
    assert resolve_layers("all", 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("top-7@{ranking}", "asks for 7 blocks and .* ranks 6"),
        ("top-0@{ranking}", "selects no block; use top-1"),
        ("top-5", "lacks the ranking .* top-5@ranking.json"),
        ("top-2@nowhere.json", "is no ranking"),
        ("worst-2@{wrong}", "is no ranking"),
        ("linear_attention", "no block of this model whose configuration names no kinds"),
        ("all,3", "names a block twice"),
        ("tops-3@{ranking}", "not understood"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(ranking, tmp_path, layer, match):
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"num_layers": 8, "order": [1, 1]}))
    layer = layer.format(ranking=ranking, wrong=wrong)
    with pytest.raises(ValueError, match=match) as error:
        resolve_layers(layer, 8)
    assert "\n" not in str(error.value)
    if "@" in layer:
        with pytest.raises(ValueError, match=match):
            check_layers(layer)


def test_another_depth_and_another_kind(ranking):
    with pytest.raises(ValueError, match="ranks the blocks of a model of 8, not 4"):
        resolve_layers(f"top-1@{ranking}", 4)
    with pytest.raises(ValueError, match="no block of this model of full_attention, linear_attention"):
        resolve_layers("sliding_attention", 8, KINDS)


def test_an_adapter_keeps_the_blocks_and_not_the_path(tmp_path):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({"num_layers": 4, "order": [3, 0, 1, 2]}))
    model = wrap(layer=f"top-2@{path}")
    config = model.peft_config["default"]
    assert config.layer == config.layer_indices == [0, 3]
    model.save_pretrained(tmp_path / "run")
    assert str(path) not in (tmp_path / "run" / "adapter_config.json").read_text()


def test_kinds_of_a_model():
    model = wrap(build_architecture("qwen3_next"), layer="full_attention")
    assert model.peft_config["default"].layer_indices == [1, 3]
    assert model.peft_config["default"].layer == "full_attention"
    with pytest.raises(ValueError, match="linear_attention"):
        wrap(build("Gemma3Text", layer_types=["sliding_attention", "full_attention"] * 2), layer="linear_attention")
