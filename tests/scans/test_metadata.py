"""Metadata tables: whom rows are about, typed cells, contradictions by name, rows that are about nobody."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.metadata import Metadata, Who, read_metadata
from isimed_index.scans.tables import cell, plain_number, read_table, typed


@pytest.fixture
def read(tmp_path):
    def read(*texts: str) -> Metadata:
        paths = []
        for number, text in enumerate(texts, start=1):
            paths.append(tmp_path / f"{number}.csv")
            paths[-1].write_text(text)
        return read_metadata(paths)

    return read


class TestCells:
    def test_cells_are_typed_by_column(self, read):
        metadata = read(
            "participant_id,Age,Site Code,n,weight,note,under,big,empty\n"
            "a,34,007,1,70.5,x,1_2,12345678901234567890,\n"
            "b,n/a,012,-2,1e2,NA,3_4,1,n/a\n"
        )
        assert metadata.of(Who("x", subject="a")) == {
            "age": 34,
            "site_code": "007",
            "n": 1,
            "weight": 70.5,
            "note": "x",
            "under": "1_2",
            "big": "12345678901234567890",
        }
        assert metadata.of(Who("x", subject="b")) == {
            "site_code": "012",
            "n": -2,
            "weight": 100.0,
            "under": "3_4",
            "big": "1",
        }

    def test_a_column_has_one_type_in_all_tables(self, read):
        metadata = read("scan,score,n\na,1,1\n", "scan,score,n\nb,high,2.5\n")
        assert metadata.of(Who("a")) == {"score": "1", "n": 1.0}
        assert type(metadata.of(Who("a"))["n"]) is float

    def test_codes_of_sexes_and_splits_stay_texts(self, read):
        row = read("scan,sex,split,session\na,1,0,2\n").of(Who("a"))
        assert row == {"sex": "1", "split": "0", "session": "2"}

    @pytest.mark.parametrize("separator", ["\t", ",", ";"])
    def test_separators(self, read, separator):
        assert read(separator.join(("scan", "age")) + "\n" + separator.join((" a ", "3")) + "\n").of(Who("a")) == {
            "age": 3
        }

    def test_a_byte_order_mark_and_blank_lines_do_not_matter(self, read):
        assert read("\ufeffscan,age\n\na,3\n\n").of(Who("a")) == {"age": 3}

    @pytest.mark.parametrize(
        ("text", "value"), [("7", 7), ("-2.50", -2.5), ("1e2", 100.0), (".5", 0.5), ("0", 0), ("+3", 3)]
    )
    def test_plain_numbers(self, text, value):
        found = plain_number(text)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize("text", ["007", "1_000", "nan", "inf", "", " 3", "1e999", "0x1", "٣", "1" * 20, "1.2.3"])
    def test_what_is_no_plain_number(self, text):
        assert plain_number(text) is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("name,age\na,3\n", "none of the columns"),
            ("", "none of the columns"),
            ("subject,age\na,3\nb,90+\n", r"column age: expected numbers, found '90\+'"),
            ("subject,Age,age\na,3,4\n", "two columns 'age'"),
            ("subject,note,age\na,fine, thanks,3\n", "line 2: expected 3 cells, found 4"),
        ],
    )
    def test_a_malformed_table_is_a_usage_error(self, read, tmp_path, text, match):
        with pytest.raises(UsageError, match=match) as caught:
            read(text)
        assert str(tmp_path) not in caught.value.line()

    def test_not_a_table(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01scan")
        with pytest.raises(UsageError, match=r"t\.csv cannot be read"):
            read_metadata([tmp_path / "t.csv"])

    def test_two_rows_that_differ_are_refused_by_name_and_the_others_stand(self, read):
        metadata = read("subject,age,site\na,3,x\nb,4,y\na,5,x\n")
        with pytest.raises(ScanRefused, match=r"1\.csv says different things of a: lines 2 and 4 differ in age"):
            metadata.of(Who("s", subject="a"))
        assert metadata.of(Who("s", subject="b")) == {"age": 4, "site": "y"}

    def test_the_same_row_twice_is_fine(self, read):
        assert read("subject,age\na,3\na,3\n").of(Who("s", subject="a")) == {"age": 3}

    def test_two_tables_that_differ_are_refused_by_name(self, read):
        metadata = read("subject,age,sex\na,3,F\nb,4,M\n", "subject,age,site\na,4,x\nb,4,y\n")
        with pytest.raises(ScanRefused, match=r"1\.csv and 2\.csv say different things of a in the column age"):
            metadata.of(Who("s", subject="a"))
        assert metadata.of(Who("s", subject="b")) == {"age": 4, "sex": "M", "site": "y"}


class TestWhom:
    def test_the_scan_goes_before_its_session_and_that_before_its_subject(self, read):
        metadata = read(
            "participant_id,age,site,sex\nsub-01,30,x,F\n",
            "participant_id,session_id,age,weight\nsub-01,ses-1,31,70\nsub-01,ses-2,32,71\n",
            "filename,age\nsub-01_ses-2_T2w.nii.gz,33\n",
        )
        who = Who("sub-01_ses-2_T1w", ("sub-01_ses-2_T1w", "sub-01_ses-2_T1w.nii.gz"), "sub-01", "ses-2")
        assert metadata.of(who) == {"age": 32, "site": "x", "sex": "F", "weight": 71, "session": "ses-2"}
        other = Who("s", ("sub-01_ses-2_T2w", "sub-01_ses-2_T2w.nii.gz"), "sub-01", "ses-2")
        assert metadata.of(other)["age"] == 33
        assert metadata.of_subject(who) == {"age": 30, "site": "x", "sex": "F"}

    def test_a_table_may_say_whose_a_file_is(self, read):
        metadata = read(
            "file,subject,session\nin/a.nii,P1,v1\n.\\in\\b.nii,P2,v1\n", "subject,session,age\nP1,v1,50\nP2,v1,60\n"
        )
        a, b = (Who(stem, (stem, f"{stem}.nii", f"in/{stem}.nii")) for stem in "ab")
        assert metadata.of(a) == {"subject": "P1", "session": "v1", "age": 50}
        assert metadata.of(b) == {"subject": "P2", "session": "v1", "age": 60}
        assert metadata.unmatched([a, b]) == {}

    def test_one_row_of_a_subject_gives_its_session_and_several_do_not(self, read):
        metadata = read("subject,session,age\na,s1,3\nb,s1,4\nb,s2,5\n")
        assert metadata.of(Who("x", subject="a")) == {"session": "s1", "age": 3}
        assert metadata.of(Who("x", subject="b")) == {}
        assert metadata.of(Who("x", subject="b", session="s2")) == {"session": "s2", "age": 5}

    def test_a_scan_without_subject_is_its_own(self, read):
        assert read("participant_id,age\nT1,3\n").of(Who("T1")) == {"age": 3}

    def test_a_name_that_two_files_share_names_neither(self, read):
        metadata = read("scan,age\nT1,3\nc_T1,4\n")
        everyone = [Who("a_T1", ("T1", "a/T1.nii")), Who("b_T1", ("T1", "b/T1.nii")), Who("c_T1", ("c_T1",))]
        assert list(metadata.ambiguous(everyone)) == [0, 1]
        assert "'T1' of the metadata table 1.csv is about 2 files" in metadata.ambiguous(everyone)[0]
        assert metadata.ambiguous(everyone[1:]) == {}

    def test_rows_about_nobody_are_told_of(self, read):
        metadata = read("subject,age\na,3\nsub-O1,4\nc,5\n", "scan,n\nx,1\n")
        assert metadata.unmatched([Who("x", subject="a")]) == {"1.csv": ["sub-O1", "c"]}

    def test_no_table_says_nothing(self):
        assert read_metadata([]).of(Who("a", ("b",), "c")) == {}


NAMES = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6)
CELLS = st.one_of(
    st.none(),
    st.integers(-(10**12), 10**12),
    st.floats(-1e9, 1e9).map(lambda number: round(number, 6)),
    st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=12),
)


@given(
    columns=st.lists(NAMES, min_size=1, max_size=5, unique=True),
    rows=st.lists(st.lists(CELLS, min_size=5, max_size=5), min_size=1, max_size=6),
    separator=st.sampled_from(["\t", ",", ";"]),
)
def test_a_table_that_was_written_is_read_back(tmp_path_factory, columns, rows, separator):
    """Cells come back as they were written, through the oracle of the standard library's own writer."""
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    written = [["" if value is None else str(value) for value in row[: len(columns)]] for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows([["subject", *columns], *[[f"s{n}", *row] for n, row in enumerate(written)]])
    table = read_table(path, "the table")
    assert [[row[column] for column in columns] for row in table.rows] == written
    for place, column in enumerate(columns):
        texts = [cell(row[place]) for row in written]
        values = typed(texts)
        for text, value in zip(texts, values, strict=True):
            assert (value is None) == (text is None), column
            if isinstance(value, str):
                assert value == text
            elif value is not None:
                assert float(value) == float(text)
