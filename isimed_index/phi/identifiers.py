"""Identifiers that the user knows of, and looking for them in texts and in bytes.

A line of the list is looked for as a whole and in its parts (DOE^JOHN: DOE, JOHN); a date as it is commonly written;
everything in any case. A word of six characters or more counts anywhere, also inside of other words. What is shorter
stands in any bytes by chance: it is looked for in texts alone, where no letter stands beside it. Digits count where
neither letter nor digit stands beside them: they are part of every digest and decimal number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from isimed_index.errors import UsageError
from isimed_index.phi.patterns import without_ours
from isimed_index.scans.allowed import day_of

_LONG = 6  # characters
_LEAST_LETTERS, _LEAST_DIGITS = 3, 4
_PARTS = re.compile(r"[\s^,;=/\\|_]+")
_ENCODINGS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be")
_BLOCK = 2**22
_TWO_BYTES = 2**16


@dataclass(frozen=True)
class Identifiers:
    """Words to look for, each with the line of the list that it comes from; words are case-folded."""

    lines: dict[str, int]
    ignored: tuple[int, ...] = ()  # lines of which nothing is long enough to be looked for

    @classmethod
    def of(cls, listed: Iterable[str]) -> Identifiers:
        """The words of a list, one identifier a line; empty lines are passed over."""
        lines: dict[str, int] = {}
        ignored = []
        for number, line in enumerate(listed, start=1):
            text = line.strip().strip("\ufeff")
            words = [word for word in _words(text) if _is_long_enough(word)]
            for word in words:
                lines.setdefault(word, number)
            if text and not words:
                ignored.append(number)
        return cls(lines, tuple(ignored))

    @classmethod
    def read(cls, path: Path) -> Identifiers:
        """The words of a file in UTF-8, or else Latin-1; `UsageError` when it cannot be read or holds none."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"the list {path.name} cannot be read ({error.strerror})", next_step="give one identifier a line"
            ) from None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        found = cls.of(text.splitlines())
        if not found.lines:
            raise UsageError(f"the list {path.name} holds no identifier", next_step="give one identifier a line")
        return found

    def in_text(self, text: str) -> set[int]:
        """Lines of the list whose identifier a text holds."""
        if not self.lines:
            return set()
        folded = text.casefold()
        found = {self.lines[match] for match in self._long.findall(folded)} if self._long else set()
        found |= {self.lines[match] for match in self._digits.findall(folded)} if self._digits else set()
        if self._short:
            found |= {self.lines[match] for match in self._short.findall(without_ours(text).casefold())}
        return found

    def in_bytes(self, content: bytes) -> set[int]:
        """Lines of the list whose identifier stands in bytes, in one of the encodings."""
        found: set[int] = set()
        if not self._needles:
            return found
        longest = max(map(len, self._needles))
        view = memoryview(content)
        for start in range(0, max(1, len(view)), _BLOCK):
            block = bytes(view[max(0, start - 1) : start + _BLOCK + longest + 1])
            found |= self._in_block(block)
        return found

    def _in_block(self, block: bytes) -> set[int]:
        low = block.lower()
        codes = np.frombuffer(low, np.uint8).astype(np.uint16)  # (n,)
        if len(codes) < _LONG:
            return set()
        pairs = codes[:-1] << 8 | codes[1:]
        at = np.flatnonzero(self._starts[0][pairs[: len(pairs) - 4]])
        for step in (1, 2):
            at = at[self._starts[step][pairs[at + 2 * step]]]
        found = set()
        for place in at.tolist():
            for needle in self._by_start.get(low[place : place + _LONG], ()):
                if low.startswith(needle, place) and self._stands_alone(low, place, needle):
                    found.add(self._needles[needle])
        return found

    def _stands_alone(self, low: bytes, place: int, needle: bytes) -> bool:
        """Of digits, whether neither letter nor digit nor decimal point stands beside them; of other words, always."""
        digits = needle.replace(b"\0", b"")
        if not digits.isdigit():
            return True
        width = len(needle) // len(digits)
        before = low[max(0, place - width) : place].strip(b"\0")
        after = low[place + len(needle) : place + len(needle) + width].strip(b"\0")
        return not (before.isalnum() or before == b"." or after.isalnum())

    @cached_property
    def _long(self) -> re.Pattern[str] | None:
        return _any_of((word for word in self.lines if len(word) >= _LONG and not word.isdigit()), "{}")

    @cached_property
    def _short(self) -> re.Pattern[str] | None:
        words = (word for word in self.lines if len(word) < _LONG and not word.isdigit())
        return _any_of(words, r"(?<![^\W\d_])({})(?![^\W\d_])")

    @cached_property
    def _digits(self) -> re.Pattern[str] | None:
        return _any_of(filter(str.isdigit, self.lines), r"(?<![0-9a-z.])({})(?![0-9a-z])")

    @cached_property
    def _needles(self) -> dict[bytes, int]:
        """What long words look like in bytes, ASCII in lower case; other letters in both cases."""
        needles: dict[bytes, int] = {}
        for word, line in self.lines.items():
            for form in {word, word.upper(), word.title()} if len(word) >= _LONG else ():
                for encoding in _ENCODINGS:
                    encoded = form.encode(encoding, "ignore").lower()
                    if len(encoded) >= _LONG and len(form.encode(encoding, "replace")) == len(encoded):
                        needles.setdefault(encoded, line)
        return needles

    @cached_property
    def _by_start(self) -> dict[bytes, list[bytes]]:
        starts: dict[bytes, list[bytes]] = {}
        for needle in self._needles:
            starts.setdefault(needle[:_LONG], []).append(needle)
        return starts

    @cached_property
    def _starts(self) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """For each of three pairs of bytes: whether a needle begins with it. Rules out nearly all places at once."""
        tables = [np.zeros(_TWO_BYTES, bool) for _ in range(3)]
        for needle in self._needles:
            for step, table in enumerate(tables):
                table[needle[2 * step] << 8 | needle[2 * step + 1]] = True
        return tables


def _any_of(words: Iterable[str], form: str) -> re.Pattern[str] | None:
    """One expression for many words, the longest first."""
    several: Sequence[str] = sorted(words, key=len, reverse=True)
    return re.compile(form.format("|".join(map(re.escape, several)))) if several else None


def _is_long_enough(word: str) -> bool:
    return len(word) >= (_LEAST_DIGITS if word.isdigit() else _LEAST_LETTERS)


def _words(text: str) -> Iterator[str]:
    """An identifier as a whole, in other orders of writing, and in its parts; case-folded."""
    folded = text.casefold()
    parts = [part for part in _PARTS.split(folded) if part]
    yield folded
    yield from (" ".join(parts), "_".join(parts), "".join(parts), *parts)
    if (day := day_of(text.replace("-", ""))) is not None:
        for form in ("%Y-%m-%d", "%Y%m%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y"):
            yield day.strftime(form)
