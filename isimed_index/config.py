"""One frozen dataclass per verb, read from TOML; a flag overrides a file, an unknown key fails.

preset (a TOML in the package, with every field)  ←  its table of the method  ←  --config FILE.toml  ←  flags
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from isimed_index.errors import ConfigError

Method = Literal["isimed", "barlowtwins", "simclr", "regisimed", "coordinate"]
Preset = Literal["paper", "default", "tiny"]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly two views of a place differ; probabilities in 0…1, no view is ever mirrored.

    `rotation_deg` and `scale` (a fraction) bound the pose; `curve_probability` draws a random contrast curve, of which
    `arbitrary_curve_probability` are not monotone and `invert_probability` are turned upside down (shares of the
    curves, not of the views); `bias` is the sd of the log of a smooth shading field; `noise` bounds the sd of the
    noise, in units of the −1…1 intensity range. `slices_probability` gives views the resolution of slices, 1 to
    `thickest_vox` voxels thick, along one axis. `shift_vox` bounds how far each of two views of a place lies from it.
    `holes` and `shuffle_probability` are the paper's views (ISImed, §2.2.2): six boxes are dropped, or all but six are,
    and then the voxels of two cubes are shuffled.
    """

    rotation_deg: float = 10.0
    scale: float = 0.08
    curve_probability: float = 0.7
    arbitrary_curve_probability: float = 0.3
    invert_probability: float = 0.3
    bias: float = 0.3
    noise: float = 0.05
    slices_probability: float = 0.0
    thickest_vox: float = 4.0
    shift_vox: float = 4.0
    holes: bool = False
    shuffle_probability: float = 0.0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("rotation_deg", "scale", "bias", "noise", "shift_vox"), 0)
        _check_least(self, least | {"thickest_vox": 1})
        for name in (*_PROBABILITIES, "scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"expected {name} from 0 to 1, found {getattr(self, name)}")


_PROBABILITIES = (
    "curve_probability",
    "arbitrary_curve_probability",
    "invert_probability",
    "slices_probability",
    "shuffle_probability",
)


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """Everything that decides what a pretraining run does; stored with the encoder.

    A step draws `batch_scans` scans, `crops_per_scan` places in each and `views_per_crop` views (cubes of `view_vox`
    voxels at `spacing_mm`) of each place. The methods see at most `patches_per_scan` patches (or pairs of views) of
    each scan, chosen among those that wide views show; where a view is one patch, `pretrain_config` draws as many.

    `isimed` joins a distance, a coordinate and a descriptor objective, each where its weight is above zero. Distances
    are measured in units of `unit_mm` (voxels, where it equals `spacing_mm`), over `pairs` within scans or `all` of the
    batch, squared, or by a Huber loss that is linear beyond `huber` units. `redundancy_weight` is what `barlowtwins`
    gives to all that is not on the diagonal; `regisimed` adds `barlowtwins_weight` times that loss to the distances'.
    `coordinate` compares offsets within scans or, with `pairs = "all"`, coordinates in the common frame.
    `registered_to` names the reference whose frame that is, by the id that `isimed register` gave it; all millimetres,
    within scans too, are then the reference's, by the scans' transforms of `registered_kind`. Without one, the frame is
    each scan's foreground centroid. After `charts_after` epochs every scan gets a chart: an affine into a frame of the
    cohort, fitted to what the position head says. From then on all millimetres, within scans too, are canonical.

    Crops are centred on voxels of the foreground, `near_crops` of them (after the first of a scan) within 40 mm of
    another, and `border_probability` of them up to half a patch away from it. `places = "box"` draws cubes that lie
    inside the foreground's box instead, as the paper does. `cache_gib` of prepared scans stay in memory; of other scans
    boxes are read when they are needed.
    """

    method: Method = "isimed"
    network: Literal["stem", "valid", "densenet121"] = "stem"
    width: int = 16
    embedding_dim: int = 64
    descriptor_dim: int = 64
    spacing_mm: float = 2.0
    window_low: float = 0.0  # physical values that go to -1 and 1, such as -1000 and 1000 HU for CT;
    window_high: float = 0.0  # equal: two percentiles of every scan do
    clip: float = 1.5  # scaled values are cut off at ±clip; 0: nowhere, as in the paper

    view_vox: int = 56
    crops_per_scan: int = 2
    views_per_crop: int = 2
    places: Literal["foreground", "box"] = "foreground"
    near_crops: float = 0.0
    border_probability: float = 0.0
    batch_scans: int = 2
    patches_per_scan: int = 512
    epochs: int = 20
    steps_per_epoch: int = 0  # 0: as many as show every scan once

    pairs: Literal["within", "all"] = "within"
    registered_to: str = ""  # a reference's id, for pairs across scans; empty: foreground centroids lie on each other
    registered_kind: Literal["rigid", "affine"] = "rigid"
    unit_mm: float = 100.0
    near_mm: float = 20.0  # 0: every pair counts the same, as in the paper
    distance_weight: float = 1.0
    coordinate_weight: float = 1.0
    descriptor_weight: float = 0.3
    ignore_mm: float = 14.0
    descriptor_temperature: float = 0.1
    huber: float = 0.0  # 0: squared errors, as in the paper
    charts_after: int = 0  # epochs after which every scan is carried by a chart of its own; 0: none is
    redundancy_weight: float = 0.005
    barlowtwins_weight: float = 1000.0
    simclr_temperature: float = 0.05

    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "exponential"] = "cosine"
    decay: float = 0.9  # per epoch, for the exponential schedule
    warmup_steps: int = 30
    clip_norm: float = 1.0
    ema: float = 0.0  # decay per step of the moving average of the weights that is stored; 0: the weights as they are
    validation_share: float = 0.0  # of the subjects, held out; the epoch with the best loss on them is stored
    patience: int = 0  # stop after so many epochs without a better validation loss; 0: never
    checkpoint_minutes: float = 5.0  # between checkpoints within an epoch; every epoch ends with one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    cache_gib: float = 2.0
    sampler_threads: int = 0  # 0: half as many as there are cores, eight at most

    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        least = dict.fromkeys(_AT_LEAST_ONE, 1) | dict.fromkeys(_AT_LEAST_ZERO, 0)
        _check_least(self, least | {"patches_per_scan": 2})  # a distance is between two
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"expected {name} > 0, found {getattr(self, name)}")
        for name in ("ema", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"expected {name} from 0 to below 1, found {getattr(self, name)}")
        if self.patience and not self.validation_share:
            raise ConfigError("patience waits for a better validation loss, and validation_share is 0")
        for name in ("near_crops", "border_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"expected {name} from 0 to 1, found {getattr(self, name)}")
        if self.places == "box" and (self.near_crops or self.border_probability):
            raise ConfigError("near_crops and border_probability choose among the foreground, found places 'box'")
        joint = self.method == "isimed"
        if joint and not self.distance_weight + self.coordinate_weight + self.descriptor_weight > 0:
            raise ConfigError("at least one objective needs a weight above 0")
        if not -math.inf < self.window_low <= self.window_high < math.inf:
            raise ConfigError(f"expected window_low ≤ window_high, found {self.window_low} and {self.window_high}")
        if self.registered_to and self.pairs != "all":
            raise ConfigError(f'registered_to is for pairs "all", across scans, found pairs "{self.pairs}"')
        if self.registered_kind != "rigid" and not self.registered_to:
            raise ConfigError("registered_kind chooses among transforms to a reference, and registered_to is empty")
        if not (self.clip == 0 or 1 <= self.clip < math.inf):
            raise ConfigError(f"expected clip 0 (none) or 1 or more, found {self.clip}")
        if self.views_per_crop not in (1, 2):
            raise ConfigError(f"expected views_per_crop 1 or 2, found {self.views_per_crop}")
        if self.view_vox < _PATCH_VOX or (self.view_vox - _PATCH_VOX) % 4:
            raise ConfigError(f"expected view_vox 32, 36, 40, …, found {self.view_vox}")
        if joint and self.descriptor_weight > 0 and (self.views_per_crop != 2 or self.view_vox == _PATCH_VOX):
            raise ConfigError("the descriptor objective needs two views per crop, each wider than one patch")
        if self.method in TWO_VIEW_METHODS and self.views_per_crop != 2:
            raise ConfigError(f"{self.method} compares two views of a crop, found views_per_crop {self.views_per_crop}")
        heads = joint and (self.coordinate_weight > 0 or self.descriptor_weight > 0)
        if self.network == "densenet121" and (heads or self.view_vox != _PATCH_VOX):
            raise ConfigError("densenet121 takes single 32³ patches and has neither a coordinate nor a descriptor head")
        if self.charts_after:
            self._check_charts(positions=self.method == "coordinate" or (joint and self.coordinate_weight > 0))

    def _check_charts(self, *, positions: bool) -> None:
        """Raise `ConfigError` unless charts can be fitted, which takes a position head, and are used for an epoch."""
        if self.network == "densenet121":
            raise ConfigError("charts_after needs a position head, which densenet121 has not")
        if not positions:
            raise ConfigError(
                "charts_after needs a position head: that of method isimed, with a coordinate_weight above 0, or of "
                f"method coordinate; found {self.method} with coordinate_weight {self.coordinate_weight}"
            )
        if self.charts_after >= self.epochs:
            raise ConfigError(f"expected charts_after below epochs ({self.epochs}), found {self.charts_after}")


_PATCH_VOX = 32  # of every network
TWO_VIEW_METHODS = ("barlowtwins", "simclr", "regisimed")
_POSITIVE = ("spacing_mm", "unit_mm", "learning_rate", "descriptor_temperature", "simclr_temperature", "decay")
_AT_LEAST_ONE = (
    "width",
    "embedding_dim",
    "descriptor_dim",
    "crops_per_scan",
    "batch_scans",
    "epochs",
)
_AT_LEAST_ZERO = (
    "steps_per_epoch",
    "near_mm",
    "distance_weight",
    "coordinate_weight",
    "descriptor_weight",
    "ignore_mm",
    "huber",
    "charts_after",
    "redundancy_weight",
    "barlowtwins_weight",
    "weight_decay",
    "warmup_steps",
    "clip_norm",
    "patience",
    "checkpoint_minutes",
    "seed",
    "cache_gib",
    "sampler_threads",
)


def _check_least(config: Any, least: Mapping[str, int]) -> None:
    """Raise `ConfigError` unless every field named is finite and at least what is said."""
    for name, bound in least.items():
        if not bound <= getattr(config, name) < math.inf:
            raise ConfigError(f"expected {name} ≥ {bound}, found {getattr(config, name)}")


def naming_fields(config: PretrainConfig) -> dict[str, Any]:
    """The fields by which a training is known from others: all, but those that came later where they change nothing.

    So what an earlier version began can be gone on with where it is the same training, and only there.
    """
    return {name: value for name, value in dataclasses.asdict(config).items() if _BEFORE.get(name, ...) != value}


_BEFORE = {"clip": 1.5, "registered_to": "", "registered_kind": "rigid"}  # what was done before there was such a field


def pretrain_config(
    preset: str = "default", file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> PretrainConfig:
    """Resolve a pretraining configuration: preset, then TOML file, then the overrides that are not None.

    A preset's tables `[methods.NAME]` hold what is different for a method; that of the method which is asked for in the
    end is laid over the preset before anything else is.
    """
    names = get_args(Preset)
    if preset not in names:
        raise ConfigError(f"expected a preset among {', '.join(names)}, found {preset!r}")
    text = files("isimed_index").joinpath("pretrain", "presets", f"{preset}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    by_method = values.pop("methods", {})
    from_file = _read_toml(file) if file is not None else {}
    passed = {key: value for key, value in (overrides or {}).items() if value is not None}
    asked = _merged(from_file, passed)
    method = asked.get("method", values["method"])
    if isinstance(method, str):  # what is no method's name is refused below, with the names that are
        values = _merged(values, by_method.get(method, {}))
    values = _merged(values, asked)
    try:
        return _as_drawn(from_mapping(PretrainConfig, values), asked)
    except ConfigError as error:
        raise _placed(error, file, from_file, passed) from None


def _as_drawn(config: PretrainConfig, asked: Mapping[str, Any]) -> PretrainConfig:
    """Where a view is one patch, as many crops as the patches that are asked for, and no patch of the crops left out.

    `ConfigError` where both numbers are asked for and differ.
    """
    if config.view_vox != _PATCH_VOX or not asked.keys() & {"crops_per_scan", "patches_per_scan"}:
        return config
    views = 1 if config.method in TWO_VIEW_METHODS else config.views_per_crop  # of a crop, each a patch by itself
    crops, most = config.crops_per_scan, config.patches_per_scan
    if "patches_per_scan" not in asked:
        return dataclasses.replace(config, patches_per_scan=max(most, crops * views))
    if most % views:
        raise ConfigError(f"expected patches_per_scan as a multiple of the {views} views of a crop, found {most}")
    if "crops_per_scan" in asked and crops * views != most:
        raise ConfigError(
            "a view of 32 voxels is one patch: expected as many patches as are drawn, found "
            f"patches_per_scan {most} and crops_per_scan {crops} ({crops * views} patches)",
            next_step="leave out crops_per_scan or patches_per_scan: one follows from the other",
        )
    return dataclasses.replace(config, crops_per_scan=most // views)


def _placed(
    error: ConfigError, file: Path | None, from_file: Mapping[str, Any], passed: Mapping[str, Any]
) -> ConfigError:
    """The error with the file that holds the field it names, and with what to do next."""
    own = _keys(from_file) - set(passed)
    if file is None or not any(re.search(rf"\b{re.escape(key)}\b", error.message) for key in own):
        return ConfigError(error.message, next_step=error.next_step or "isimed pretrain --help")
    explained = f"correct {file.name}; help(isimed_index.config.PretrainConfig) explains the fields"
    return ConfigError(f"{file.name}: {error.message}", next_step=error.next_step or explained)


def _keys(values: Mapping[str, Any]) -> set[str]:
    """Names of all fields, those of tables too."""
    inner = [_keys(value) for value in values.values() if isinstance(value, Mapping)]
    return set(values).union(*inner)


Config = TypeVar("Config")


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a configuration dataclass from plain values; unknown keys and wrong types raise `ConfigError`."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"; did you mean {where}{close[0]}?" if close else ""
        raise ConfigError(
            f"unknown configuration key {where}{unknown[0]}{hint}", next_step=f"known keys: {', '.join(sorted(hints))}"
        )
    resolved: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"expected a table for {where}{name}, found {value!r}")
            resolved[name] = from_mapping(hint, value, f"{where}{name}.")
        else:
            resolved[name] = _checked(f"{where}{name}", hint, value)
    return kind(**resolved)


def _checked(name: str, hint: Any, value: Any) -> Any:
    choices = get_args(hint)
    if choices:
        if value not in choices:
            raise ConfigError(f"expected {name} among {', '.join(map(str, choices))}, found {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"expected {name} as {_SAID[hint]}, found {value!r}")
    return value


_SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except IsADirectoryError as error:
        raise ConfigError(
            f"expected a TOML file, found the folder {file.name}", next_step=f"give a file, such as {file.name}.toml"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the configuration file {file.name} cannot be read: {error.strerror}", next_step="check the path"
        ) from error
    except ValueError as error:  # malformed TOML, or bytes that are not UTF-8
        raise ConfigError(f"{file.name} is not TOML: {error}", next_step="write lines such as epochs = 20") from error
