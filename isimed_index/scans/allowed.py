"""The one list of facts that are taken out of a header: DICOM tags and keys of JSON side-cars → typed columns.

Nothing that is not on this list is stored. A fact says how an image was made, or is one of the few things of a person
that many share (sex, years of age, weight, height). Numbers are held against a range, and texts against a vocabulary:
technicians type names into any field, so a text that is no word of the vocabulary is dropped, and that is counted.
Free texts (descriptions, protocol names, comments) are not here, nor are dates, times, ids and UIDs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

from isimed_index.scans import vocabulary

FactValue = str | int | float | bool
OLDEST_YEARS = 90  # ages above 89 are this one: few people share them (HIPAA Safe Harbor, 45 CFR 164.514(b)(2)(i)(C))
_AGE = re.compile(r"(\d{3})([DWMY])", re.ASCII)
_DAYS_IN = {"D": 1.0, "W": 7.0, "M": 365.25 / 12, "Y": 365.25}
_DATE = re.compile(r"\d{8}", re.ASCII)
_PHARMACEUTICAL = "RadiopharmaceuticalInformationSequence"


@dataclass(frozen=True, slots=True)
class Fact:
    """One column: the tag and the key it is read from, its type and unit, and the reading of one value.

    `read` turns what the tag holds into the column's value, or None for what is not in its range or vocabulary.
    `side_car_factor` turns the side-car's number into the tag's: BIDS counts seconds where DICOM counts milliseconds.
    `group` is the functional group of enhanced files that holds the tag, under the keyword `in_group` or its own.
    """

    column: str
    type: Literal["string", "float64", "bool"]
    unit: str | None
    tag: str
    read: Callable[[Any], FactValue | None]
    side_car: str = ""  # its key; empty: the tag's keyword
    side_car_factor: float = 1.0
    group: str = ""
    in_group: str = ""

    @property
    def key(self) -> str:
        """The key that a JSON side-car has it under."""
        return self.side_car or self.tag


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken out of one header by column, and the columns of which a value was there and dropped."""

    values: dict[str, FactValue] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def within(least: float, most: float, scale: float = 1.0) -> Callable[[Any], float | None]:
    """A reading of finite numbers from `least` to `most`, after they were multiplied by `scale`.

    Six significant digits are kept: more is no measurement, and a patient's number that was typed in does not survive.
    """

    def read(value: Any) -> float | None:
        if isinstance(value, bool):
            return None
        try:
            number = float(value) * scale
        except (TypeError, ValueError):
            return None
        return float(f"{number:.6g}") if math.isfinite(number) and least <= number <= most else None

    return read


def years(value: Any) -> float | None:
    """An age in whole years (hundredths below 2), from `045Y`, `018M` or a number; 90 stands for all above 89."""
    match = _AGE.fullmatch(value.strip().upper()) if isinstance(value, str) else None
    number = within(0, 150)(int(match[1]) * _DAYS_IN[match[2]] / _DAYS_IN["Y"] if match else value)
    if number is None:
        return None
    return round(number, 2) if number < 2 else float(min(math.floor(number), OLDEST_YEARS))


def years_between(birth: str, study: str) -> float | None:
    """Whole years from a birth to a study, both `YYYYMMDD`; None when one is no date or the order is wrong."""
    born, seen = day_of(birth), day_of(study)
    if born is None or seen is None or seen < born:
        return None
    return years(float(seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))))


def day_of(text: str) -> date | None:
    """The day that a DICOM date (`YYYYMMDD`) says; None for anything else."""
    text = text.strip()
    if not _DATE.fullmatch(text):
        return None
    try:
        return datetime.strptime(text, "%Y%m%d").date()
    except ValueError:
        return None


def take(facts: Sequence[Fact], value_of: Callable[[Fact], Any]) -> Taken:
    """Read each fact from what `value_of` finds for it; None and empty texts are no value."""
    values: dict[str, FactValue] = {}
    dropped = []
    for fact in facts:
        found = value_of(fact)
        if found is None or (isinstance(found, str | list | tuple) and not len(found)):
            continue
        value = fact.read(found)
        if value is None:
            dropped.append(fact.column)
        else:
            values[fact.column] = value
    return Taken(values, tuple(dropped))


def from_side_car(content: Mapping[str, Any]) -> Taken:
    """The facts of a JSON side-car (BIDS, dcm2niix), in the units of the columns; other keys are not looked at."""

    def value_of(fact: Fact) -> Any:
        value = content[fact.key]
        if fact.side_car_factor == 1 or isinstance(value, bool):
            return value
        try:
            return float(value) * fact.side_car_factor
        except (TypeError, ValueError):
            return value

    return take([fact for fact in FACTS if fact.key in content], value_of)


FACTS = (
    Fact("body_part", "string", None, "BodyPartExamined", vocabulary.body_part),
    Fact("manufacturer", "string", None, "Manufacturer", vocabulary.manufacturer),
    Fact("scanner_model", "string", None, "ManufacturerModelName", vocabulary.model, "ManufacturersModelName"),
    Fact("image_type", "string", None, "ImageType", vocabulary.image_type),
    Fact("patient_position", "string", None, "PatientPosition", vocabulary.patient_position),
    Fact(
        "contrast_agent", "bool", None, "ContrastBolusAgent", vocabulary.contrast, "ContrastBolusIngredient"
    ),  # whether, never which: the agent's name is free text
    Fact("burned_in_annotation", "bool", None, "BurnedInAnnotation", vocabulary.yes_or_no),
    Fact("slice_thickness_mm", "float64", "mm", "SliceThickness", within(0, 1000), group="PixelMeasuresSequence"),
    # CT
    Fact("kvp", "float64", "kV", "KVP", within(1, 500), group="CTXRayDetailsSequence"),
    Fact(
        "convolution_kernel",
        "string",
        None,
        "ConvolutionKernel",
        vocabulary.kernel,
        group="CTReconstructionSequence",
    ),
    # MR
    Fact("field_strength_t", "float64", "T", "MagneticFieldStrength", within(0.001, 30)),
    Fact(
        "echo_time_ms",
        "float64",
        "ms",
        "EchoTime",
        within(0, 1e5),
        side_car_factor=1e3,
        group="MREchoSequence",
        in_group="EffectiveEchoTime",
    ),
    Fact(
        "repetition_time_ms",
        "float64",
        "ms",
        "RepetitionTime",
        within(0, 1e5),
        side_car_factor=1e3,
        group="MRTimingAndRelatedParametersSequence",
    ),
    Fact(
        "inversion_time_ms",
        "float64",
        "ms",
        "InversionTime",
        within(0, 1e5),
        side_car_factor=1e3,
        group="MRModifierSequence",
        in_group="InversionTimes",
    ),
    Fact(
        "flip_angle_degrees",
        "float64",
        "degree",
        "FlipAngle",
        within(0, 360),
        group="MRTimingAndRelatedParametersSequence",
    ),
    Fact("mr_acquisition", "string", None, "MRAcquisitionType", vocabulary.mr_acquisition),
    Fact("scanning_sequence", "string", None, "ScanningSequence", vocabulary.scanning_sequence),
    # PET: amounts and spans, never times of day
    Fact("pet_units", "string", None, "Units", vocabulary.pet_units),
    Fact(
        "radionuclide",
        "string",
        None,
        "Radionuclide",
        vocabulary.radionuclide,
        "TracerRadionuclide",
        1.0,
        _PHARMACEUTICAL,
    ),
    Fact(
        "injected_dose_mbq",
        "float64",
        "MBq",
        "RadionuclideTotalDose",
        within(0.1, 1e5, scale=1e-6),
        "InjectedRadioactivity",
        1e6,  # BIDS counts MBq
        _PHARMACEUTICAL,
    ),
    Fact("half_life_s", "float64", "s", "RadionuclideHalfLife", within(60, 1e6), group=_PHARMACEUTICAL),
    Fact("decay_correction", "string", None, "DecayCorrection", vocabulary.decay_correction),
    Fact("pet_corrections", "string", None, "CorrectedImage", vocabulary.pet_corrections),
    # The person
    Fact("sex", "string", None, "PatientSex", vocabulary.sex),
    Fact("age", "float64", "year", "PatientAge", years),
    Fact("weight_kg", "float64", "kg", "PatientWeight", within(0.1, 500)),
    Fact("height_m", "float64", "m", "PatientSize", within(0.1, 2.6)),
)
COLUMNS = tuple(fact.column for fact in FACTS)
