"""One exception tree; every error carries a stable `kind` and says what to do next.

    IsimedError
    ├── UsageError            (ValueError)         kind usage              exit 2
    │   └── ConfigError                            kind config             exit 2
    ├── ScanRefused           (ValueError)         kind scan_refused       exit 1 alone, 3 in a batch
    ├── NotFound              (KeyError)           kind not_found          exit 1
    ├── OutsideScan           (ValueError)         kind outside_scan       exit 1
    ├── MissingExtra          (ImportError)        kind missing_extra      exit 1
    ├── TrainingDiverged      (ArithmeticError)    kind training_diverged  exit 1
    ├── SqlRefused            (ValueError)         kind sql_refused        exit 1
    ├── WorkerFailed          (ConnectionError)    kind worker_failed      exit 1, 3 when it cost single scans
    ├── StoreNotFound         (FileNotFoundError)  kind store_not_found    exit 10
    ├── StoreFull             (OSError)            kind store_full         exit 1
    ├── StoreReadOnly         (PermissionError)    kind store_read_only    exit 1
    ├── StoreUnreadable       (OSError)            kind store_unreadable   exit 1
    │   └── StoreUnreachable  (ConnectionError)    kind store_unreachable  exit 1
    ├── StoreLocked           (BlockingIOError)    kind store_locked       exit 11
    ├── StoreDamaged          (OSError)            kind store_damaged      exit 12
    ├── Incompatible          (ValueError)         kind incompatible       exit 13
    │   ├── EncoderMismatch                        kind encoder_mismatch   exit 13
    │   │   └── RuntimeMismatch
    │   └── EncoderNotTrusted                      kind encoder_not_trusted exit 13
    └── RecallBelowTarget     (ValueError)         kind recall_below_target exit 14

    IsimedWarning (UserWarning)
    ├── IsimedNote         nothing is wrong, and something is worth knowing
    ├── StoreWarning       the answer is right, but something in the store wants repair
    └── TrainingWarning    the run goes on, but what it learns may be of no use

`str(error)` is one sentence: what was expected, what was found, where. `error.next_step` is the command or
action that mends it. Neither holds patient data: files are named by their base name only.
"""

from __future__ import annotations


class IsimedError(Exception):
    """Base of all errors that this library raises on purpose."""

    kind = "error"
    exit_code = 1
    report: object = None  # what was done before, where a verb that commits as it goes ended by it

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return self.message

    def line(self) -> str:
        """The error as one line: `error[kind]: what, where. Next: what to do.`"""
        text = " ".join(f"error[{self.kind}]: {self.message}".split())
        if not text.endswith((".", "?", "!")):
            text += "."
        return f"{text} Next: {self.next_step}" if self.next_step else text


class UsageError(IsimedError, ValueError):
    """An argument is malformed or out of range."""

    kind = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or field is unknown or out of range."""

    kind = "config"


class ScanRefused(IsimedError, ValueError):
    """A file cannot become a scan; the rest of its batch goes on."""

    kind = "scan_refused"


class NotFound(IsimedError, KeyError):
    """A scan, encoder, label or generation of that name is not in the store."""

    kind = "not_found"


class OutsideScan(IsimedError, ValueError):
    """A point lies outside the scan that it was asked in."""

    kind = "outside_scan"


class MissingExtra(IsimedError, ImportError):
    """An optional package is not installed."""

    kind = "missing_extra"


class TrainingDiverged(IsimedError, ArithmeticError):
    """The loss became NaN or infinite."""

    kind = "training_diverged"


class SqlRefused(IsimedError, ValueError):
    """A statement is not a read-only query, failed, or ran past its time or memory limit."""

    kind = "sql_refused"


class WorkerFailed(IsimedError, ConnectionError):
    """A worker died, could not write, or was lost with its scheduler; the scan that it was at may well be whole."""

    kind = "worker_failed"


class StoreNotFound(IsimedError, FileNotFoundError):
    """There is no store at that path."""

    kind = "store_not_found"
    exit_code = 10


class StoreFull(IsimedError, OSError):
    """There is no room left where the store lies."""

    kind = "store_full"


class StoreReadOnly(IsimedError, PermissionError):
    """The store can be read, but this process may not write to it."""

    kind = "store_read_only"


class StoreUnreadable(IsimedError, OSError):
    """A file of the store could not be read for a reason that lies outside it; it may well be whole."""

    kind = "store_unreadable"


class StoreUnreachable(StoreUnreadable, ConnectionError):
    """The service that holds the store did not answer, or refused to."""

    kind = "store_unreachable"


class StoreLocked(IsimedError, BlockingIOError):
    """Another process holds a lock, or commits kept conflicting."""

    kind = "store_locked"
    exit_code = 11


class StoreDamaged(IsimedError, OSError):
    """A file of the store is missing, truncated, or does not match its hash."""

    kind = "store_damaged"
    exit_code = 12


class Incompatible(IsimedError, ValueError):
    """The store was written by a newer format, or needs a feature that this version lacks."""

    kind = "incompatible"
    exit_code = 13


class EncoderMismatch(Incompatible):
    """Embeddings of two encoders were about to be mixed, or weights do not match their card."""

    kind = "encoder_mismatch"


class RuntimeMismatch(EncoderMismatch):
    """A runtime gives other vectors than PyTorch does for the same weights."""


class EncoderNotTrusted(Incompatible):
    """An encoder runs on code outside of this library, and nobody said that this code may be run."""

    kind = "encoder_not_trusted"


class RecallBelowTarget(IsimedError, ValueError):
    """No index configuration reached the recall asked for."""

    kind = "recall_below_target"
    exit_code = 14


class IsimedWarning(UserWarning):
    """Base of all warnings that this library gives on purpose; the command line shows these and no others."""


class IsimedNote(IsimedWarning):
    """Nothing is wrong, and something is worth knowing; the command line shows it as a remark, not with --quiet."""


class StoreWarning(IsimedWarning):
    """The store gave a right answer by a detour (an older generation, an exact search) and wants repair."""


class TrainingWarning(IsimedWarning):
    """A training run goes on, but what it learns may be of no use (the embeddings are collapsing)."""
