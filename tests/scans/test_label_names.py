"""Names of labels in every format that is about; each told by its content, whatever its file is called."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isimed_index.errors import UsageError
from isimed_index.scans.label_names import read_label_names

SLICER = """# Color table file names.ctbl
# 4 values
0 Background 0 0 0 0
1 left 231 255 0 255
7 (none) 0 0 0 0
-2 right_lobe 1 2 3 255
"""
FREESURFER = """#$Id: FreeSurferColorLUT.txt,v 1.105 2015/07/29 18:23:03 greve Exp $

#No. Label Name:                            R   G   B   A

0   Unknown                                 0   0   0   0
1   left                                    70  130 180 0
-2  right_lobe                              245 245 245 0
"""
SNAP = """################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
    1   255    0    0        1  1  1    "left"
   -2     0  255    0     0.50  1  1    "right_lobe"
"""
DSEG = "index\tname\tabbreviation\tcolor\tmapping\n1\tleft\tL\t#ff53bb\t1\n-2\tright_lobe\tR\t#2f8bbe\tn/a\n"
SLICER_CSV = (
    "LabelValue,Name,Color_R,Color_G,Color_B,Color_A\n0,background,0,0,0,0\n1,left,1,2,3,255\n-2,right_lobe,4,5,6,255\n"
)


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "names.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "text",
    [
        "label,name\n1,left\n-2, right_lobe\n",
        "name\tindex\tcolour\nleft\t1\tred\nright_lobe\t-2\tblue\n",
        "value,name\n1,left\n-2,right_lobe\n1,left\n",
        DSEG,
        SLICER,
        SLICER.replace(" ", "\t").replace("#\t", "# "),
        SLICER_CSV,
        FREESURFER,
        SNAP,
        '{"1": "left", "-2": "right_lobe"}',
        '{"left": 1, "right_lobe": -2}',
        '{"left": "1", "right_lobe": "-2"}',
        '{"labels": {"0": "background", "1": "left", "-2": "right_lobe"}, "modality": {"0": "CT"}}',
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "left": 1, "right_lobe": -2}}',
        '{"LabelMap": {"1": "left", "-2": "right_lobe"}}',
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_says_the_same(file, text, mark):
    assert read_label_names(file(mark + text)) == {1: "left", -2: "right_lobe"}


def test_names_with_spaces(file):
    assert read_label_names(file("1 left lobe of it 1 2 3 255\n2 other 1 2 3 255\n")) == {
        1: "left lobe of it",
        2: "other",
    }
    assert read_label_names(file('1 255 0 0 1 1 1 "left lobe, upper"\n')) == {1: "left lobe, upper"}


def test_a_list_names_by_place(file):
    assert read_label_names(file('{"LabelMap": ["BG", "WM", "GM"]}')) == {1: "WM", 2: "GM"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a column"),
        ("label,title\n1,left\n", "needs a column"),
        ("number,name\n1,left\n", "needs a column"),
        ("label,name\none,left\n", "line 2"),
        ("label,name\n1,left\n2\n", "line 3"),
        ("label,name\n1,left\n\n1,right\n", "line 4: label 1 has two names, 'left' and 'right'"),
        ("label,name\n1,left\n2,left\n", "line 3: the name 'left' is that of label 1 and of label 2"),
        (SLICER + "3 x 1 2\n", "line 7: expected a whole number, a name and colours"),
        (SLICER + "1 other 1 2 3 4\n", "line 7: label 1 has two names"),
        (SNAP + "3 1 2 3 1 1 1 unquoted\n", "line 9"),
        (FREESURFER + "9 left 1 2 3 0\n", "line 8: the name 'left'"),
        ('{"1": "a", "1": "b"}', "label 1 has two names"),
        ('{"1": "a", "2": "a"}', "the name 'a'"),
        ('{"1": 2}', "entry '1'"),
        ('{"a": "b"}', "entry 'a'"),
        ('{"a": true}', "entry 'a'"),
        ('{"a": 1.5}', "entry 'a'"),
        ('{"whole tumour": [1, 2]}', "stands for several labels"),
        ("{}", "expected an object with names"),
        ("[1, 2]", "expected an object with names"),
        ('{"1": ', "no sound JSON"),
    ],
)
def test_malformed_tables_are_usage_errors_that_say_where(file, tmp_path, text, says):
    with pytest.raises(UsageError, match=says) as caught:
        read_label_names(file(text))
    assert str(tmp_path) not in caught.value.line()
    assert "names.txt" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.csv cannot be read"):
        read_label_names(tmp_path / "gone.csv")


WORDS = st.text("abcdefghijklmnopqrstuvwxyz-_", min_size=2, max_size=12).filter(lambda word: word.strip("-_"))


@given(
    names=st.dictionaries(st.integers(-999, 30000).filter(bool), WORDS, min_size=1, max_size=8).filter(
        lambda names: len(set(names.values())) == len(names)
    )
)
def test_what_was_written_in_any_format_is_read_back(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    texts = {
        "csv": "label,name\n" + "".join(f"{n},{name}\n" for n, name in names.items()),
        "ctbl": "# Color table file\n" + "".join(f"{n} {name} 1 2 3 255\n" for n, name in names.items()),
        "snap": "# ITK-SnAP\n" + "".join(f'{n} 1 2 3 1 1 1 "{name}"\n' for n, name in names.items()),
        "json": json.dumps({str(n): name for n, name in names.items()}),
        "nnunet": json.dumps({"labels": {"background": 0} | {name: n for n, name in names.items()}}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        assert read_label_names(folder / name) == names, name
