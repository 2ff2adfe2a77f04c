"""Progress goes to stderr: bars on a terminal, lines in a log, nothing when it is not wanted."""

from __future__ import annotations

import io

import pytest

from isimed_cli import progress as shown_progress
from isimed_cli.progress import Bars, Lines, progress_on
from isimed_index.progress import Progress, Silent


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    """An outer job of two steps with one inner job."""
    progress.start("encode", 2, "scans")
    progress.start("load", None, "files")
    progress.advance(3)
    progress.finish()
    progress.advance(note="310 patches/s")
    progress.advance()
    progress.finish()


def test_lines_tell_the_end_of_each_task_and_its_last_note():
    stream = io.StringIO()
    with progress_on(stream, shown=True) as progress:
        assert isinstance(progress, Lines)
        work(progress)
    assert stream.getvalue().splitlines() == ["load: 3 files · 0 s", "encode: 2/2 scans · 0 s · 310 patches/s"]


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("train", 100, "epochs")
    for _ in range(40):
        clock[0] += 1
        lines.advance(note="loss 0.1")
    assert stream.getvalue().splitlines() == [
        "train: 10/100 epochs · 10 s · 1 epochs/s · ETA 90 s · loss 0.1",
        "train: 20/100 epochs · 20 s · 1 epochs/s · ETA 80 s · loss 0.1",
        "train: 30/100 epochs · 30 s · 1 epochs/s · ETA 70 s · loss 0.1",
        "train: 40/100 epochs · 40 s · 1 epochs/s · ETA 60 s · loss 0.1",
    ]


def test_a_task_that_is_gone_on_with_counts_all_and_reckons_by_what_is_new(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("pretrain", 10, "steps", 3)
    clock[0] += 10
    lines.advance(2)
    assert stream.getvalue() == "pretrain: 5/10 steps · 10 s · 0.2 steps/s · ETA 25 s\n"


def test_a_bar_that_is_gone_on_with_counts_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with progress_on(stream, shown=True) as progress:
        progress.start("pretrain", 10, "steps", 3)
        progress.advance(2)
    assert "5/10" in stream.getvalue()


def test_the_last_line_is_printed_once(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("add", 2, "scans")
    clock[0] += 11
    lines.advance(2)
    lines.finish()
    assert stream.getvalue() == "add: 2/2 scans · 11 s · 0.182 scans/s\n"


def test_a_single_thing_has_no_rate(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("runtime", 1, "choice")
    clock[0] += 4
    lines.advance(1, "openvino, 230 patches/s")
    lines.finish()
    assert stream.getvalue() == "runtime: 1/1 choice · 4 s · openvino, 230 patches/s\n"


def test_a_task_of_unknown_length_has_a_rate_and_no_eta(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("load", None, "files")
    lines.advance()
    clock[0] += 8
    lines.advance()
    lines.finish()
    assert stream.getvalue().splitlines() == ["load: 2 files · 8 s · 0.25 files/s"]


def test_bars_show_name_count_and_note_and_close_after_an_error():
    stream = Terminal()

    def fail() -> None:
        with progress_on(stream, shown=True) as progress:
            assert isinstance(progress, Bars)
            work(progress)
            progress.start("measure", 5, "pairs")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    text = stream.getvalue()
    assert "encode" in text
    assert "2/2" in text
    assert "310 patches/s" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_nothing_is_shown_when_not_wanted():
    stream = Terminal()
    with progress_on(stream, shown=False) as progress:
        assert isinstance(progress, Silent)
        work(progress)
    assert stream.getvalue() == ""


def test_a_note_that_knows_how_much_time_is_left_takes_the_place_of_the_units(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start("encode", 4, "scans")
    clock[0] += 10
    lines.advance(2, note="310 patches · 31 patches/s · ETA 95 s")
    assert stream.getvalue().splitlines() == [
        "encode: 2/4 scans · 10 s · 0.2 scans/s · 310 patches · 31 patches/s · ETA 95 s"
    ]


def test_a_bar_shows_one_time_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with progress_on(stream, shown=True) as progress:
        progress.start("encode", 4, "scans")
        progress.advance(note="310 patches · ETA 95 s")
    (last,) = [line for line in stream.getvalue().splitlines() if "310 patches" in line][-1:]
    assert "ETA 95 s" in last
    assert last.count("ETA") == 1
