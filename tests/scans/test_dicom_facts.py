"""The allow-list: what is taken out of headers and side-cars, in which unit, and what is dropped."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicoms import CT, PT, ROOT, noise, write_enhanced, write_series
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from isimed_index.scans.allowed import COLUMNS, FACTS, from_side_car, years, years_between
from isimed_index.scans.dicom.series import Series, group
from isimed_index.scans.read import read_series
from isimed_index.scans.surrogate import Surrogates

KEY = Surrogates(b"\x07" * 32)
OTHER_KEY = Surrogates(b"\x08" * 32)


def series_of(folder: Path) -> Series:
    found, left = group(sorted(path for path in folder.rglob("*") if path.is_file()), KEY)
    assert [item.reason.line() for item in left] == []
    (series,) = found
    return series


def facts_of(folder: Path, **tags) -> tuple[dict, tuple[str, ...]]:
    """The facts and the dropped columns of a series with some tags, less those that the test series always has."""
    write_series(folder, noise((7, 9, 3)), **{"PatientBirthDate": "", "BodyPartExamined": "", **tags})
    series = series_of(folder)
    dropped = tuple(column for column in series.dropped if column != "scanner_model" or "ManufacturerModelName" in tags)
    return {key: value for key, value in series.facts.items() if key not in ("modality", "image_type")}, dropped


@pytest.mark.parametrize(
    ("tag", "value", "column", "kept"),
    [
        ("BodyPartExamined", "CHEST", "body_part", "CHEST"),
        ("Manufacturer", "SIEMENS Healthineers", "manufacturer", "Siemens"),
        ("Manufacturer", "GE MEDICAL SYSTEMS", "manufacturer", "GE"),
        ("ManufacturerModelName", "SOMATOM Definition AS+", "scanner_model", "SOMATOM Definition AS+"),
        ("ManufacturerModelName", "DISCOVERY MR750w", "scanner_model", "DISCOVERY MR750w"),
        ("ManufacturerModelName", "Aquilion ONE", "scanner_model", "Aquilion ONE"),
        ("PatientPosition", "HFS", "patient_position", "HFS"),
        ("BurnedInAnnotation", "NO", "burned_in_annotation", False),
        ("ContrastBolusAgent", "Ultravist 300 Dr. Mustermann", "contrast_agent", True),
        ("ContrastBolusAgent", "NONE", "contrast_agent", False),
        ("SliceThickness", "2.5", "slice_thickness_mm", 2.5),
        ("KVP", "120", "kvp", 120.0),
        ("ConvolutionKernel", ["Br40d", "3"], "convolution_kernel", "Br40d 3"),
        ("ConvolutionKernel", "STANDARD", "convolution_kernel", "STANDARD"),
        ("ConvolutionKernel", "FC08", "convolution_kernel", "FC08"),
        ("MagneticFieldStrength", "3", "field_strength_t", 3.0),
        ("EchoTime", "2.46", "echo_time_ms", 2.46),
        ("RepetitionTime", "2300", "repetition_time_ms", 2300.0),
        ("InversionTime", "900", "inversion_time_ms", 900.0),
        ("FlipAngle", "9", "flip_angle_degrees", 9.0),
        ("MRAcquisitionType", "3D", "mr_acquisition", "3D"),
        ("ScanningSequence", ["GR", "IR"], "scanning_sequence", "GR IR"),
        ("Units", "BQML", "pet_units", "BQML"),
        ("DecayCorrection", "START", "decay_correction", "START"),
        ("CorrectedImage", ["DECY", "ATTN", "ERIKA"], "pet_corrections", "DECY ATTN"),
        ("PatientSex", "F", "sex", "F"),
        ("PatientAge", "045Y", "age", 45.0),
        ("PatientAge", "093Y", "age", 90.0),
        ("PatientAge", "018M", "age", 1.5),
        ("PatientWeight", "71.5", "weight_kg", 71.5),
        ("PatientSize", "1.78", "height_m", 1.78),
    ],
)
def test_each_fact_is_read(tmp_path, tag, value, column, kept):
    facts, dropped = facts_of(tmp_path, **{tag: value})
    assert facts == {column: kept}
    assert type(facts[column]) is type(kept)
    assert dropped == ()


@pytest.mark.parametrize(
    ("tag", "value", "column"),
    [
        ("BodyPartExamined", "ERIKA", "body_part"),
        ("Manufacturer", "Mustermann AG", "manufacturer"),
        ("ManufacturerModelName", "Mustermann 3000", "scanner_model"),
        ("ManufacturerModelName", "Frankenstein Skyra", "scanner_model"),
        ("ManufacturerModelName", "Skyra 4711", "scanner_model"),
        ("PatientPosition", "ERIKA", "patient_position"),
        ("SliceThickness", "-1", "slice_thickness_mm"),
        ("KVP", "47110815", "kvp"),
        ("RepetitionTime", "47110815", "repetition_time_ms"),
        ("ConvolutionKernel", "Erika", "convolution_kernel"),
        ("ConvolutionKernel", ["Br40d", "Erika"], "convolution_kernel"),
        ("Units", "ERIKA", "pet_units"),
        ("ScanningSequence", ["GR", "ERIKA"], "scanning_sequence"),
        ("DecayCorrection", "ERIKA", "decay_correction"),
        ("PatientSex", "X", "sex"),
        ("PatientWeight", "0", "weight_kg"),
        ("PatientAge", "151Y", "age"),
    ],
)
def test_what_is_no_word_and_in_no_range_is_dropped_and_counted(tmp_path, tag, value, column):
    facts, dropped = facts_of(tmp_path, **{tag: value})
    assert facts == {}
    assert dropped == (column,)


def test_words_of_image_type_are_kept_and_others_are_not(tmp_path):
    write_series(tmp_path, noise(), ImageType=["ORIGINAL", "PRIMARY", "M", "MUSTERMANN", "DIS2D"])
    assert series_of(tmp_path).facts["image_type"] == "ORIGINAL PRIMARY M DIS2D"


def test_a_fact_that_files_do_not_agree_on_is_none_of_the_series(tmp_path):
    paths = write_series(tmp_path, noise(), KVP="120", SliceThickness="2", Manufacturer="Philips")
    for number, change in ((0, {"KVP": "100"}), (2, {"SliceThickness": ""}), (3, {"Manufacturer": "Erika"})):
        dataset = pydicom.dcmread(paths[number])
        for tag, value in change.items():
            setattr(dataset, tag, value)
        dataset.save_as(paths[number])
    series = series_of(tmp_path)
    assert not {"kvp", "slice_thickness_mm", "manufacturer"} & set(series.facts)
    assert {"kvp", "slice_thickness_mm", "manufacturer"} <= set(series.dropped)


def test_enhanced_files_say_it_in_groups(tmp_path):
    frames = [
        {
            "MREchoSequence": {"EffectiveEchoTime": 3.5},
            "MRTimingAndRelatedParametersSequence": {"RepetitionTime": "2300", "FlipAngle": "9"},
            "MRModifierSequence": {"InversionTimes": 900.0},
        }
        for _ in range(6)
    ]
    frames[3]["MRTimingAndRelatedParametersSequence"]["FlipAngle"] = "8"
    write_enhanced(tmp_path / "a", noise(), frame_tags=frames)
    series = series_of(tmp_path)
    asked = ("echo_time_ms", "repetition_time_ms", "inversion_time_ms", "flip_angle_degrees")
    assert {key: series.facts[key] for key in asked if key in series.facts} == {
        "echo_time_ms": 3.5,
        "repetition_time_ms": 2300.0,
        "inversion_time_ms": 900.0,
    }
    assert "flip_angle_degrees" in series.dropped


def test_pet_says_how_much_and_never_when(tmp_path):
    item, code = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "C-111A1", "SRT", "^18^Fluorine"
    item.RadionuclideCodeSequence = Items([code])
    item.RadionuclideTotalDose, item.RadionuclideHalfLife = "312500000", "6586.2"
    item.RadiopharmaceuticalStartTime, item.RadiopharmaceuticalStartDateTime = "091500", "20240229091500"
    item.Radiopharmaceutical = "FDG for Mustermann"
    write_series(
        tmp_path, noise(dtype=np.uint16, low=0), sop_class=PT, RadiopharmaceuticalInformationSequence=Items([item])
    )
    facts = series_of(tmp_path).facts
    assert (facts["radionuclide"], facts["injected_dose_mbq"], facts["half_life_s"]) == ("F18", 312.5, 6586.2)
    assert "0915" not in str(facts)


def test_ages():
    assert years_between("19640812", "20240811") == 59
    assert years_between("19640812", "20240812") == 60
    assert years_between("19240812", "20240812") == 90
    assert years_between("20240812", "19640812") is None
    assert years_between("1964", "20240812") is None
    assert [years(value) for value in (89.9, 90, 104, 46.7, "200Y", -1, "old", True)] == [89, 90, 90, 46, *[None] * 4]


@given(
    milliseconds=st.floats(0.01, 5000),
    column=st.sampled_from([("EchoTime", "echo_time_ms"), ("InversionTime", "inversion_time_ms")]),
)
def test_side_cars_count_seconds(milliseconds, column):
    key, name = column
    for told in (milliseconds / 1000, repr(milliseconds / 1000)):
        assert from_side_car({key: told}).values[name] == pytest.approx(milliseconds, rel=1e-5)


def test_a_side_car_with_names_gives_facts_alone():
    content = {
        "Modality": "MR",
        "ManufacturersModelName": "Prisma_fit",
        "MagneticFieldStrength": 3,
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "Erika"],
        "TracerRadionuclide": "F18",
        "InjectedRadioactivity": 312.5,
        "RepetitionTime": 2.3,
        "PatientName": "Mustermann^Erika",
        "PatientBirthDate": "1964-08-12",
        "AcquisitionTime": "11:22:33",
        "SeriesDescription": "t1 Mustermann",
        "BodyPartExamined": "ERIKA",
        "PatientSex": "female",
    }
    taken = from_side_car(content)
    assert taken.values == {
        "scanner_model": "Prisma_fit",
        "field_strength_t": 3.0,
        "image_type": "ORIGINAL PRIMARY M ND",
        "radionuclide": "F18",
        "injected_dose_mbq": 312.5,
        "repetition_time_ms": 2300.0,
        "sex": "F",
    }
    assert taken.dropped == ("body_part",)


def test_the_list_has_each_column_once():
    assert len(set(COLUMNS)) == len(COLUMNS) == len(FACTS)
    assert all(name == name.lower() for name in COLUMNS)


class TestBurnedIn:
    def test_is_taken_when_allowed_and_marked(self, tmp_path):
        paths = write_series(tmp_path, noise(), BurnedInAnnotation="NO")
        dataset = pydicom.dcmread(paths[1])
        dataset.BurnedInAnnotation = "YES"
        dataset.save_as(paths[1])
        found, left = group(paths, KEY)
        assert not found
        assert "--allow-burned-in" in left[0].reason.next_step
        (series,), _ = group(paths, KEY, allow_burned_in=True)
        assert series.facts["burned_in_annotation"] is True
        assert "burned_in_annotation" not in series.dropped


class TestOverlays:
    def test_in_unused_bits_and_in_their_own_group_are_never_read(self, tmp_path):
        voxels = noise(dtype=np.uint16, low=0, high=4096)
        write_series(tmp_path / "plain", voxels, stored=12, series=f"{ROOT}1")
        drawn = voxels | (np.random.default_rng(0).integers(0, 2, voxels.shape) << 12).astype(np.uint16)
        for path in write_series(tmp_path / "drawn", drawn, stored=12, series=f"{ROOT}2"):
            dataset = pydicom.dcmread(path)
            dataset.add_new((0x6000, 0x0010), "US", 9)
            dataset.add_new((0x6000, 0x0011), "US", 7)
            dataset.add_new((0x6000, 0x0100), "US", 16)
            dataset.add_new((0x6000, 0x0102), "US", 12)
            dataset.add_new((0x6000, 0x3000), "OW", b"Mustermann" * 2)
            dataset.save_as(path)
        plain, drawn_scan = (read_series(series_of(tmp_path / name), "x") for name in ("plain", "drawn"))
        assert drawn_scan.digest == plain.digest
        assert drawn_scan.voxels.max() < 4096


class TestStudyDays:
    @given(
        first=st.dates(date(1900, 1, 1), date(2100, 1, 1)),
        days=st.integers(-20000, 20000),
        subject=st.text(min_size=1, max_size=20),
    )
    def test_differences_within_a_subject_are_exact(self, first, days, subject):
        second = first + timedelta(days=days)
        assert KEY.day(subject, second) - KEY.day(subject, first) == days
        assert Surrogates(b"\x07" * 32).day(subject, first) == KEY.day(subject, first)

    @given(
        day=st.dates(date(1900, 1, 1), date(2100, 1, 1)),
        subjects=st.lists(st.text(max_size=9), min_size=2, unique=True),
    )
    def test_across_subjects_and_keys_nothing_is_told(self, day, subjects):
        one, other = subjects[:2]
        assert KEY.day(one, day) != KEY.day(other, day)
        assert KEY.day(one, day) != OTHER_KEY.day(one, day)
        assert 10**9 <= KEY.day(one, day) < 2**31

    def test_numbers_of_one_date_lie_anywhere(self):
        """Whoever knows a date but not the key learns nothing from the numbers of others at that date."""
        days = np.array([KEY.day(f"subject-{n}", date(2024, 2, 29)) for n in range(4000)], float)
        shares = np.histogram(days, bins=10, range=(1e9, 2e9 + 8e5))[0] / len(days)
        assert np.abs(shares - 0.1).max() < 0.03

    def test_of_a_series(self, tmp_path):
        paths = write_series(tmp_path / "a", noise(), StudyDate="20240229")
        day = series_of(tmp_path / "a").day
        assert day.number("s") == KEY.day("s", date(2024, 2, 29))
        assert "2024" not in repr(day)
        dataset = pydicom.dcmread(paths[0])
        dataset.StudyDate = "20240301"
        dataset.save_as(paths[0])
        series = series_of(tmp_path / "a")
        assert series.day is None
        assert "study_day" in series.dropped
        write_series(tmp_path / "b", noise(), StudyDate="", sop_class=CT)
        assert series_of(tmp_path / "b").day is None
