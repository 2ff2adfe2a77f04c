"""Configurations: precedence, refusals, and the numbers of the paper."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest

from isimed_index.config import (
    Augmentation,
    Method,
    Preset,
    PretrainConfig,
    from_mapping,
    naming_fields,
    pretrain_config,
)
from isimed_index.errors import ConfigError


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_preset_resolves(preset: str) -> None:
    assert pretrain_config(preset).method == "isimed"


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_preset_says_every_field(preset: str) -> None:
    """None is left to the defaults of the class, so a preset means the same whatever becomes of those."""
    text = files("isimed_index").joinpath("pretrain", "presets", f"{preset}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    assert values.keys() - {"methods"} == {field.name for field in fields(PretrainConfig)}
    assert values["augmentation"].keys() == {field.name for field in fields(Augmentation)}


@pytest.mark.parametrize(
    ("preset", "own", "of_views"),
    [
        (
            "default",
            {"width": 24, "distance_weight": 4.0, "batch_scans": 4, "epochs": 40, "steps_per_epoch": 100},
            {},
        ),
        (
            "tiny",
            {"epochs": 12, "steps_per_epoch": 60},
            {"curve_probability": 0.5, "arbitrary_curve_probability": 0.1, "invert_probability": 0.2, "bias": 0.2},
        ),
    ],
)
def test_a_preset_differs_from_the_defaults_where_it_says_so(
    preset: str, own: dict[str, Any], of_views: dict[str, float]
) -> None:
    shared = {"descriptor_weight": 1.0, "learning_rate": 1e-3, "warmup_steps": 100}
    expected = replace(PretrainConfig(), **shared, **own, augmentation=replace(Augmentation(), **of_views))
    assert pretrain_config(preset) == expected


def test_fields_that_came_later_name_a_training_only_where_they_change_it() -> None:
    names = {field.name for field in fields(PretrainConfig)}
    assert naming_fields(PretrainConfig()).keys() == names - {"clip", "registered_to", "registered_kind"}
    other = PretrainConfig(clip=0.0, pairs="all", registered_to="atlas", registered_kind="affine")
    assert naming_fields(other) == asdict(other)


def test_flags_override_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = toml(tmp_path, "epochs = 7\nwidth = 5\n[augmentation]\nnoise = 0.5\n")
    preset = pretrain_config("tiny")
    assert {preset.epochs, preset.width}.isdisjoint({3, 5, 7})
    config = pretrain_config("tiny", file, {"epochs": 3, "seed": None})
    assert config == replace(preset, epochs=3, width=5, augmentation=replace(preset.augmentation, noise=0.5))


def test_a_file_changes_single_augmentations_of_a_preset(tmp_path: Path) -> None:
    config = pretrain_config("paper", toml(tmp_path, "[augmentation]\nnoise = 1\n"))
    assert (config.augmentation.noise, config.augmentation.bias, config.augmentation.rotation_deg) == (1.0, 0.0, 0.0)


def test_the_paper_preset_has_the_papers_numbers() -> None:
    """ISImed §2: DenseNet121, 1024-d, 64 scans × 16 patches of 32³, AdamW 1e-3, decay 0.9, 50 epochs, full matrix."""
    config = pretrain_config("paper")
    assert (config.network, config.embedding_dim, config.view_vox) == ("densenet121", 1024, 32)
    assert (config.batch_scans, config.crops_per_scan * config.views_per_crop) == (64, 16)
    assert config.patches_per_scan >= 16
    assert (config.learning_rate, config.weight_decay, config.schedule, config.decay) == (
        1e-3,
        1e-2,
        "exponential",
        0.9,
    )
    assert (config.epochs, config.warmup_steps, config.clip_norm) == (50, 0, 0.0)
    assert (config.pairs, config.near_mm, config.unit_mm, config.distance_weight) == ("all", 0.0, 1.0, 1.0)
    assert (config.coordinate_weight, config.descriptor_weight) == (0.0, 0.0)
    a = config.augmentation
    assert (a.rotation_deg, a.scale, a.curve_probability, a.bias, a.noise) == (0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_method_is_laid_over_its_preset_and_under_everything_else(tmp_path: Path) -> None:
    assert pretrain_config("paper").views_per_crop == 1
    asked = pretrain_config("paper", None, {"method": "simclr"})
    assert (asked.method, asked.views_per_crop, asked.augmentation.shuffle_probability) == ("simclr", 2, 0.8)
    assert asked.augmentation.rotation_deg == 0.0  # the preset's own, below it
    assert pretrain_config("paper", toml(tmp_path, "method = 'simclr'")) == asked
    file = toml(tmp_path, "method = 'simclr'\n[augmentation]\nshuffle_probability = 0.5\n")
    assert pretrain_config("paper", file).augmentation == replace(asked.augmentation, shuffle_probability=0.5)
    assert pretrain_config("paper", file, {"method": "isimed"}).augmentation.holes is False


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("most", [8, 32])
def test_where_a_view_is_one_patch_as_many_are_drawn_as_are_asked_for(tmp_path: Path, method: str, most: int) -> None:
    asked = pretrain_config("paper", None, {"method": method, "patches_per_scan": most})
    assert (asked.crops_per_scan, asked.patches_per_scan) == (most, most)
    assert pretrain_config("paper", toml(tmp_path, f"patches_per_scan = {most}"), {"method": method}) == asked
    drawn = pretrain_config("paper", toml(tmp_path, f"crops_per_scan = {most}"), {"method": method})
    assert (drawn.crops_per_scan, drawn.patches_per_scan) == (most, max(most, 16))  # none of them is left out


def test_both_views_of_a_single_patch_are_patches_where_they_are_not_paired(tmp_path: Path) -> None:
    file = toml(tmp_path, "views_per_crop = 2\n")
    assert pretrain_config("paper", file, {"patches_per_scan": 32}).crops_per_scan == 16
    with pytest.raises(ConfigError, match="patches_per_scan as a multiple of the 2 views of a crop, found 31"):
        pretrain_config("paper", file, {"patches_per_scan": 31})


def test_more_or_fewer_patches_than_are_drawn_are_refused_where_a_view_is_one(tmp_path: Path) -> None:
    file = toml(tmp_path, "crops_per_scan = 16\n")
    for most in (8, 32):
        with pytest.raises(ConfigError, match=rf"mine\.toml: .*patches_per_scan {most}.*crops_per_scan 16") as refused:
            pretrain_config("paper", file, {"patches_per_scan": most})
        assert refused.value.next_step == "leave out crops_per_scan or patches_per_scan: one follows from the other"
    assert pretrain_config("paper", file, {"patches_per_scan": 16}).crops_per_scan == 16


def test_of_wide_views_patches_are_chosen_and_no_more_crops_drawn() -> None:
    assert pretrain_config("default", None, {"patches_per_scan": 32}).crops_per_scan == 2


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_preset_resolves_for_every_method(preset: str, method: str) -> None:
    assert pretrain_config(preset, None, {"method": method}).method == method


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch = 3", "epoch"),
        ("methods = 3", "methods"),
        ("method = 3", "method"),
        ("[augmentation]\nflip = 0.5", "augmentation.flip"),
        ("augmentation = 3", "augmentation"),
        ("epochs = 3.0", "epochs"),
        ("epochs = true", "epochs"),
        ("learning_rate = true", "learning_rate"),
        ("learning_rate = '1e-3'", "learning_rate"),
        ("method = 'simsiam'", "method"),
        ("network = ['valid']", "network"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        pretrain_config("default", toml(tmp_path, text))


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"width": 0},
        {"descriptor_dim": 0},
        {"batch_scans": -1},
        {"steps_per_epoch": -1},
        {"warmup_steps": -1},
        {"seed": -1},
        {"patches_per_scan": 1},
        {"views_per_crop": 3},
        {"near_crops": 1.5},
        {"border_probability": -0.1},
        {"places": "box", "near_crops": 0.2},
        {"places": "box", "border_probability": 0.2},
        {"sampler_threads": -1},
        {"view_vox": 54},
        {"view_vox": 28},
        {"view_vox": 32},
        {"views_per_crop": 1},
        {"network": "densenet121"},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"spacing_mm": -2.0},
        {"descriptor_temperature": 0.0},
        {"simclr_temperature": 0.0},
        {"huber": -1.0},
        {"redundancy_weight": -0.1},
        {"barlowtwins_weight": math.inf},
        {"method": "simclr", "views_per_crop": 1},
        {"network": "densenet121", "method": "simclr"},
        {"decay": 0.0},
        {"decay": math.nan},
        {"distance_weight": math.nan},
        {"distance_weight": -1.0},
        {"coordinate_weight": -1.0},
        {"descriptor_weight": -1.0},
        {"near_mm": -1.0},
        {"window_low": 10.0, "window_high": -10.0},
        {"window_low": -math.inf},
        {"clip": 0.5},
        {"clip": -1.0},
        {"clip": math.inf},
        {"ignore_mm": -1.0},
        {"clip_norm": -1.0},
        {"weight_decay": -1e-4},
        {"cache_gib": -1.0},
        {"distance_weight": 0.0, "coordinate_weight": 0.0, "descriptor_weight": 0.0},
        {"augmentation": {"noise": -0.1}},
        {"augmentation": {"rotation_deg": math.inf}},
        {"augmentation": {"scale": 1.5}},
        {"augmentation": {"scale": math.nan}},
        {"augmentation": {"shift_vox": -1.0}},
        {"augmentation": {"slices_probability": 1.2}},
        {"augmentation": {"thickest_vox": 0.5}},
        {"augmentation": {"shuffle_probability": 1.1}},
        {"augmentation": {"curve_probability": 1.5}},
        {"augmentation": {"invert_probability": -0.5}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_mapping(PretrainConfig, values)


def test_a_whole_number_may_stand_for_a_real_one() -> None:
    config = from_mapping(PretrainConfig, {"spacing_mm": 3})
    assert config.spacing_mm == 3.0
    assert isinstance(config.spacing_mm, float)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="paper, default, tiny"):
        pretrain_config("huge")


@pytest.mark.parametrize("content", [b"epochs = ", b"# caf\xe9\nepochs = 3\n"], ids=["syntax", "not UTF-8"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        pretrain_config("default", file)


def test_a_missing_file_is_refused_by_its_base_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml") as refused:
        pretrain_config("default", tmp_path / "mine.toml")
    assert tmp_path.name not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says", "then"),
    [
        ("epochs = 2.5", "mine.toml: expected epochs as a whole number, found 2.5", "mine.toml"),
        ("epoch = 2", "mine.toml: unknown configuration key epoch; did you mean epochs", "known keys"),
        (
            "[augmentation]\nnoize = 0.1",
            "mine.toml: unknown configuration key augmentation.noize; did you mean augmentation.noise",
            "known keys",
        ),
        ("epochs = 0", "mine.toml: expected epochs ≥ 1, found 0", "mine.toml"),
        ("patches_per_scan = 1", "mine.toml: expected patches_per_scan ≥ 2, found 1", "mine.toml"),
        ("[augmentation]\nscale = 2", "mine.toml: expected scale from 0 to 1, found 2.0", "mine.toml"),
    ],
)
def test_an_error_names_the_file_that_it_came_from(tmp_path: Path, text: str, says: str, then: str) -> None:
    with pytest.raises(ConfigError) as refused:
        pretrain_config("default", toml(tmp_path, text))
    assert str(refused.value) == says or str(refused.value).startswith(f"{says}?")
    assert then in refused.value.next_step


def test_an_error_in_what_was_passed_does_not_blame_the_file(tmp_path: Path) -> None:
    for file in (None, toml(tmp_path, "width = 5\nepochs = 3\n")):
        with pytest.raises(ConfigError) as refused:
            pretrain_config("default", file, {"epochs": 0})
        assert str(refused.value) == "expected epochs ≥ 1, found 0"
        assert refused.value.next_step == "isimed pretrain --help"


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file, found the folder") as refused:
        pretrain_config("default", tmp_path)
    assert refused.value.next_step
