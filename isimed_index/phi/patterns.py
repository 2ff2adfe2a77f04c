"""What identifiers look like in text, and columns that hold them by their names.

The texts of a store that no patient is in must match none of these: ids such as `IXI002-Guys-0828-T1`, digests, ULIDs,
surrogates and the store's own times are left out before a pattern is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

# What the store makes itself: ULIDs, digests and ids made of hex digits, keyed surrogates.
_OURS = re.compile(
    r"""
    \b[0-7][0-9A-HJKMNP-TV-Z]{25}\b |
    (?<![0-9A-Za-z])(?=[0-9a-f]*[a-f])[0-9a-f]{12,64}(?![0-9A-Za-z]) |
    \b(series|study|subject|session|scan)-[0-9a-f]{12}(?![0-9A-Za-z])
    """,
    re.VERBOSE,
)
OUR_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_UID_BYTES = re.compile(rb"(?<![0-9.])[0-2](?:\.(?:0|[1-9][0-9]*)){6,}(?![0-9.])")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One look of an identifier; `holds` may refuse a match that only looks like it."""

    kind: str
    what: str
    form: re.Pattern[str]
    holds: Callable[[re.Match[str]], bool] = lambda match: True

    def in_text(self, text: str) -> bool:
        """Whether a text holds one."""
        return any(map(self.holds, self.form.finditer(text)))


def _is_day(*forms: str) -> Callable[[re.Match[str]], bool]:
    """Whether a match is a day of the calendar within a life's span, by one of some forms."""

    def holds(match: re.Match[str]) -> bool:
        digits = re.sub(r"[./-]", "-", match[0])
        for form in forms:
            try:
                return 1880 <= datetime.strptime(digits, form).year <= 2099
            except ValueError:
                continue
        return False

    return holds


PATTERNS = (
    Pattern("phi_uid", "a DICOM UID", re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){5,}(?![\w.])", re.ASCII)),
    Pattern("phi_name", "a person's name as DICOM writes it (DOE^JOHN)", re.compile(r"[^\W\d_]{2,}\^+[^\W\d_]+")),
    Pattern("phi_date", "a date", re.compile(r"(?<![0-9A-Za-z.])\d{8}(?![0-9A-Za-z.])", re.ASCII), _is_day("%Y%m%d")),
    Pattern(
        "phi_date",
        "a date",
        re.compile(r"(?<![0-9A-Za-z.])\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?![0-9A-SU-Za-z])", re.ASCII),
        _is_day("%Y-%m-%d"),
    ),
    Pattern(
        "phi_date",
        "a date",
        re.compile(r"(?<![0-9A-Za-z.])\d{1,2}[-/.]\d{1,2}[-/.]\d{4}(?![0-9A-Za-z])", re.ASCII),
        _is_day("%d-%m-%Y", "%m-%d-%Y"),
    ),
    Pattern(
        "phi_time", "a time of day", re.compile(r"(?<![\d:])([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?(?![\d:])", re.ASCII)
    ),
    Pattern(
        "phi_time", "a time of day", re.compile(r"(?<![\w.])([01]\d|2[0-3])[0-5]\d[0-5]\d\.\d{6}(?![\w.])", re.ASCII)
    ),
    Pattern("phi_email", "an e-mail address", re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}", re.ASCII)),
    Pattern(
        "phi_phone",
        "a telephone number",
        re.compile(
            r"(?<![\w+])(\+\d{1,3}[ /-]?\(?\d[\d ()/-]{5,}\d|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?!\w)", re.ASCII
        ),
    ),
    Pattern(
        "phi_number",
        "a social security or patient number",
        re.compile(
            r"""
            (?<!\w)(\d{3}-\d{2}-\d{4}(?![\w-]) |
            (MRN | SSN | PATID | patient[ _-]?id | case[ _-]?no)[ .:\#=_-]*[A-Z]?\d[\d-]{3,})
            """,
            re.VERBOSE | re.ASCII | re.IGNORECASE,
        ),
    ),
    Pattern(
        "phi_path",
        "a path or the name of a machine",
        re.compile(
            r"""
            (?<![\w.~/])/(home|Users|root|mnt|media|data|tmp|var|scratch|nas|export|srv|opt|net|projects?)/[^\s"] |
            ^/[^/\s]+/[^\s"]+ | (?<!\w)~[/\\]\w | (?<![A-Za-z])[A-Za-z]:\\ | \\\\[\w.-]+\\ | file:// |
            \b[\w-]+\.(local|lan|corp|internal|intranet|hospital|klinik|clinic|localdomain)\b |
            (?<![\w.])(\d{1,3}\.){3}\d{1,3}(?![\w.])
            """,
            re.VERBOSE | re.ASCII,
        ),
    ),
)
_SUSPICIOUS = re.compile(
    r"""
    (^|_)(
    (patient|last|first|given|family|full|sur|birth|maiden|person|physician|operator)_?(s_)?names? | surname |
    initials | (date_of_)?birth(_?da(te|y))? | dob | geburtsdatum | mrn | medical_record\w* | ssn |
    (patient|person|hospital)_?id |
    social_security\w* | insurance\w* | address | street\w* | zip(_?code)? | postal_?code | city | (tele)?phone\w* |
    mobile | fax | e_?mail | institution\w* | hospital | clinic | (referring|performing|attending)\w* | physician\w* |
    doctor | operators? | accession\w* | (study|series|sop|instance)\w*_?uids? | uid | station_?name |
    device_?serial\w* | serial_?number | host_?name | comments? | remarks |
    ((study|series|acquisition|content|scan|exam|visit|admission)_?)?date(time)?\w* | acq_time |
    (study|series|acquisition|content|scan|exam|visit|admission)_?time
    )($|_)
    """,
    re.VERBOSE,
)


def holds_uid(content: bytes) -> bool:
    """Whether a DICOM UID stands in bytes that are no text."""
    common = any(start in content for start in (b"1.2.", b"1.3.", b"2.25."))  # a hundred times as fast as a pattern
    return common and _UID_BYTES.search(content) is not None


def found_in(text: str) -> Iterator[Pattern]:
    """Patterns that a text matches, each kind once."""
    rest = _OURS.sub(" ", text)
    kinds = set()
    for pattern in PATTERNS:
        if pattern.kind not in kinds and pattern.in_text(rest):
            kinds.add(pattern.kind)
            yield pattern


def without_ours(text: str) -> str:
    """A text less the ids that the store makes: short names occur in these by chance."""
    return _OURS.sub(" ", text)


def is_suspicious(column: str) -> bool:
    """Whether a column or key is called as those are that hold identifiers; `PatientName` and `patient name` too."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", column).lower()
    return _SUSPICIOUS.search(snake) is not None
