"""Names that stand for identifiers, and numbers that stand for dates: nobody without the key can trace them back.

HMAC-SHA256 of a UID or a patient id, cut to 48 bits: the same series gets the same name in every store that is made
with the same key, and a list of known UIDs does not help without it. A date becomes the number of days since a day that
the key and the subject decide: two dates of a subject are as far apart as they were, and no date can be told from its
number. The key lies in a file outside of every store.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from isimed_index.errors import UsageError

KEY_VARIABLE = "ISIMED_SURROGATE_KEY"
_KEY_BYTES = 32
_HEX_DIGITS = 12
# Day numbers have ten digits and fit into int32; the span of the shifts hides a century of dates but in 4 of 10⁵ cases.
_SHIFTS_DAYS = 10**9


@dataclass(frozen=True, slots=True)
class Surrogates:
    """Makes surrogates with one key."""

    key: bytes = field(repr=False)

    def of(self, kind: str, identifier: str) -> str:
        """Such as `series-1a2b3c4d5e6f`; `kind` is part of what is hashed, so equal ids of two kinds look unlike."""
        return f"{kind}-{self._mac(kind, identifier).hex()[:_HEX_DIGITS]}"

    def day(self, subject: str, when: date) -> int:
        """Days of a date since a day that the key and the subject decide."""
        shift = int.from_bytes(self._mac("day", subject)[:16]) % _SHIFTS_DAYS
        return _SHIFTS_DAYS + shift + when.toordinal()

    def _mac(self, kind: str, identifier: str) -> bytes:
        return hmac.new(self.key, f"{kind}\0{identifier}".encode(), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class StudyDay:
    """The date of a study on its way from a header to a day number, which needs to know whose it is."""

    when: date = field(repr=False)
    surrogates: Surrogates

    @classmethod
    def of_date(cls, when: date | None, surrogates: Surrogates) -> StudyDay | None:
        """None for no date."""
        return None if when is None else cls(when, surrogates)

    def number(self, subject: str) -> int:
        """The day number of this date for a subject, by the id that the store knows it by."""
        return self.surrogates.day(subject, self.when)


def key_file() -> Path:
    """Where the key lies: the file that ISIMED_SURROGATE_KEY names, else isimed/surrogate.key in the user's config."""
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "isimed" / "surrogate.key"


def read_surrogates(path: Path, store: Path | None = None) -> Surrogates:
    """The surrogates of the key in a file, which is made, readable by its owner only, where there is none.

    `UsageError` when the file lies inside `store`, cannot be read or made, or holds no key.
    """
    if store is not None and path.resolve().is_relative_to(store.resolve()):
        raise UsageError(
            f"the surrogate key {path.name} lies inside the store", next_step="keep it elsewhere: --surrogate-key FILE"
        )
    try:
        if not path.exists():
            _make(path)
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the surrogate key {path.name} cannot be read or made ({type(error).__name__})",
            next_step="give a file of 64 hexadecimal digits, or a path where it can be made: --surrogate-key FILE",
        ) from error
    if len(key) < _KEY_BYTES:
        raise UsageError(
            f"the surrogate key {path.name} has {len(key)} bytes, expected at least {_KEY_BYTES}",
            next_step="delete it, and a new one is made; surrogates made with it change",
        )
    return Surrogates(key)


def _make(path: Path) -> None:
    """Write a new key; of two processes that do so at once, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:
            return
    finally:
        fresh.unlink()
