"""Whose code an encoder may run: a card can name any callable, and naming must never be enough to import it.

    card: factory "their_package.nets:build" ──▶ is it trusted? ── no ──▶ EncoderNotTrusted; nothing was imported
                                                       └── yes ──▶ import, and see that it is theirs

Trust is given by the person who runs this, never by a store: with `open(trust=…)`, `--trust` or ISIMED_TRUST. A name is
one callable (`their_package.nets:build`), or a module or package, all below it included. A package that is trusted
lends it only to callables of its own: what it merely imported, such as `system` of `os`, stays out of reach.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from isimed_index.errors import EncoderMismatch, EncoderNotTrusted, UsageError

VARIABLE = "ISIMED_TRUST"
OURS = "isimed_index"
_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_NAME = re.compile(rf"{_MODULE}(:[^\W\d]\w*)?")
# The folders of a path from the root: in quotes or brackets to their end, elsewhere to the next space.
_FOLDERS = re.compile(r"""(?<=['"(])(?:/|[A-Za-z]:\\)[^'")]*[/\\]|(?<!\S)(?:/|[A-Za-z]:\\)[^\s'"]*[/\\]""")
_FACTORY = re.compile(rf"{_MODULE}:[^\W\d]\w*")


def trusted(names: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of code that encoders may run, from a list or a text with commas; None: those in ISIMED_TRUST.

    `UsageError` for what is no name of a module or of a callable in one.
    """
    if names is None:
        names = os.environ.get(VARIABLE, "")
    listed = names.split(",") if isinstance(names, str) else names
    found = tuple(name.strip() for name in listed if name.strip())
    for name in found:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"expected the name of a package, a module or a factory to trust, found {name!r}",
                next_step="for example --trust their_package.nets:build",
            )
    return found


def is_ours(factory: str) -> bool:
    """Whether a factory is a network of this library, which is built from a fixed table and needs no trust."""
    return factory.split(":")[0].split(".")[0] == OURS


def trusted_factory(factory: str, trust: Sequence[str]) -> Callable[..., Any]:
    """The callable that `package.module:callable` names.

    `EncoderNotTrusted` unless `trust` covers it, before anything is imported; `EncoderMismatch` when it is not there.
    """
    if not _FACTORY.fullmatch(factory) or is_ours(factory):
        raise EncoderMismatch(
            f"expected a factory package.module:callable, found {factory!r}", next_step="correct the card"
        )
    module, name = factory.split(":")
    if factory not in trust and not _covered(module, trust):
        raise EncoderNotTrusted(
            f"the encoder runs {factory}, code outside of isimed-index that nobody here said to trust",
            next_step=f"if you know that code: --trust {factory}, or {VARIABLE}={factory}",
        )
    found = _imported(module, name)
    home = str(getattr(found, "__module__", None))
    if not callable(found) or (factory not in trust and not _covered(home, trust)):
        raise EncoderNotTrusted(
            f"{factory} is no callable that is defined in a trusted package, but one of {home}",
            next_step=f"if you know it: --trust {factory}",
        )
    return found  # type: ignore[no-any-return]


def _imported(module: str, name: str) -> Any:
    """What a module has under that name; `EncoderMismatch` says which of the two is missing, or why it fails."""
    try:
        there = importlib.import_module(module)
        if not hasattr(there, name):
            close = difflib.get_close_matches(name, dir(there), n=1)
            raise EncoderMismatch(
                f"the module {module} has no {name!r}{f'; did you mean {close[0]!r}?' if close else ''}",
                next_step="correct `factory` on the card: package.module:callable",
            )
        return getattr(there, name)
    except EncoderMismatch:
        raise
    except ModuleNotFoundError as error:
        lacking = error.name or "that it imports"
        if module == lacking or module.startswith(f"{lacking}."):
            raise EncoderMismatch(
                f"there is no module {lacking}, which the factory {module}:{name} is in",
                next_step="install its package, or name the folder that it lies in: export PYTHONPATH=FOLDER",
            ) from error
        raise EncoderMismatch(
            f"{module} needs the module {lacking}, which is not installed",
            next_step=f"install {lacking.split('.')[0]}, or name its folder in PYTHONPATH",
        ) from error
    except Exception as error:  # importing runs their code, which may fail in any way
        raise EncoderMismatch(
            f"the factory {module}:{name} cannot be imported ({type(error).__name__}: {said_by(error)})",
            next_step=f"mend what `python -c 'import {module}'` shows",
        ) from error


def said_by(error: Exception) -> str:
    """What an error in the code of others says, in one line of at most 200 characters, files by their names alone."""
    return _FOLDERS.sub("", " ".join(str(error).split()))[:200]


def _covered(module: str, trust: Sequence[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in trust)
