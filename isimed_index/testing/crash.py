"""What a power cut may leave of a directory: every prefix of what a program did to it, and less.

    with Recorder(folder) as recorder:
        change(folder)
        recorder.acknowledge()          # from here on the change was promised to last
    for image in recorder.images(): image.write(empty_folder); look(empty_folder)

The model is that of a journalling file system that keeps no promise it did not make. The content of a file is what it
was when the file was last flushed, or anything since. A name (made, linked, renamed, removed) is as it was when its
folder was last flushed, or as it is; a rename happens whole or not at all, with its target's folder. One change that
was not flushed can be there without any other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = 0
_NAMING = ("unlink", "remove", "mkdir", "rmdir", "rename", "replace", "link")  # functions of `os` that change names

Entry = tuple[int, str]  # folder and name in it; files and folders are numbers here, as names come and go
Names = Mapping[Entry, int]


@dataclass(frozen=True, slots=True)
class Image:
    """A directory as a crash may leave it: content by relative path, None for folders."""

    content: Mapping[str, bytes | None] = field(repr=False)
    acknowledged: int  # how many changes had been acknowledged, at most, when it could be found

    def write(self, folder: Path) -> None:
        """Write it into an empty folder."""
        for relative in sorted(self.content):
            data = self.content[relative]
            if data is None:
                (folder / relative).mkdir()
            else:
                (folder / relative).write_bytes(data)


@dataclass(frozen=True, slots=True)
class _Change:
    """One step in the name space; a name that is removed leads to None."""

    entries: Mapping[Entry, int | None]
    folder: int  # whose flush makes it durable


@dataclass(frozen=True, slots=True)
class _State:
    """What is durable, and what is not, after some of the events."""

    durable: Names
    pending: Sequence[_Change]
    flushed: Mapping[int, bytes]  # content by file as it was last flushed
    content: Mapping[int, bytes]
    folders: frozenset[int]
    acknowledged: int

    def images(self) -> Iterator[Mapping[str, bytes | None]]:
        """Everything lost, nothing lost, each change lost alone, each kept alone, content empty, cut short or zeros."""
        every = range(len(self.pending))
        torn = [file for file, data in self.content.items() if self.flushed.get(file) != data]
        lost = {file: self.flushed.get(file, b"") for file in torn}
        yield self._image((), lost)
        yield self._image(every, {})
        sizes = {file: len(self.content[file]) for file in torn}
        empty, zeros = dict.fromkeys(torn, b""), {file: bytes(size) for file, size in sizes.items()}
        short = {file: self.content[file][: size // 2] for file, size in sizes.items()}
        yield self._image(every, short)
        for form in (lost, empty, zeros):
            yield self._image(every, form)
            for file in torn:
                yield self._image(every, {file: form[file]})
        for file in torn:
            yield self._image((), {other: data for other, data in lost.items() if other != file})
        for change in every:
            yield self._image([other for other in every if other != change], {})
            alone = [*self._above(change), change]
            yield self._image(alone, {})
            yield self._image(alone, lost)

    def _above(self, change: int) -> list[int]:
        """The changes without which a change has no place: that made the folders above it."""
        wanted = {folder for folder, _ in self.pending[change].entries}
        above: list[int] = []
        for number in reversed(range(change)):
            made = {made for made in self.pending[number].entries.values() if made is not None}
            if made & wanted & self.folders:
                above.insert(0, number)
                wanted |= {folder for folder, _ in self.pending[number].entries}
        return above

    def _image(self, kept: Iterable[int], content: Mapping[int, bytes]) -> Mapping[str, bytes | None]:
        names = dict(self.durable)
        for number in kept:
            _apply(names, self.pending[number])
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), what in names.items():
            inside.setdefault(folder, []).append((name, what))
        image: dict[str, bytes | None] = {}
        places = [(_ROOT, "")]
        while places:
            folder, path = places.pop()
            for name, what in inside.get(folder, ()):
                if what in self.folders:
                    image[path + name] = None
                    places.append((what, f"{path}{name}/"))
                else:
                    image[path + name] = content.get(what, self.content[what])
        return image


@dataclass
class Recorder:
    """Records what this process does below `root` within a `with` block; other processes must leave it alone."""

    root: Path
    _states: list[_State] = field(default_factory=list)
    _restore: dict[str, Any] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)  # by inode, of what is in the tree
    _next: int = _ROOT
    _names: dict[Entry, int] = field(default_factory=dict)
    _durable: dict[Entry, int] = field(default_factory=dict)
    _pending: list[_Change] = field(default_factory=list)
    _content: dict[int, bytes] = field(default_factory=dict)
    _flushed: dict[int, bytes] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=set)
    _acknowledged: int = 0

    def __enter__(self) -> Recorder:
        self._look()
        self._durable, self._pending = dict(self._names), []
        self._flushed = dict(self._content)
        self._keep()
        self._restore["fsync"] = os.fsync
        setattr(os, "fsync", self._fsync)  # noqa: B010 — a type checker would not have it otherwise
        for name in _NAMING:
            self._restore[name] = getattr(os, name)
            setattr(os, name, self._watched(self._restore[name]))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._restore.items():
            setattr(os, name, original)
        self._catch_up()

    def acknowledge(self) -> None:
        """From here on, what was changed was promised to last; a program may promise several times."""
        self._catch_up()
        self._acknowledged += 1
        self._keep()

    @property
    def prefixes(self) -> int:
        """How many prefixes of events were recorded."""
        return len(self._states)

    def images(self) -> list[Image]:
        """All that a crash at any moment may leave, each once, with the most that had been acknowledged by then."""
        found: dict[frozenset[tuple[str, bytes | None]], int] = {}
        for state in self._states:
            for image in state.images():
                key = frozenset(image.items())
                found[key] = max(found.get(key, 0), state.acknowledged)
        return [Image(dict(image), acknowledged) for image, acknowledged in found.items()]

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._catch_up()
            before = dict(self._names)
            result = original(*arguments, **named)
            self._look()
            changed = {
                entry: self._names.get(entry)
                for entry in sorted({*before, *self._names})
                if before.get(entry) != self._names.get(entry)
            }
            if changed:
                # Of a rename, the folder that the name came to; one that only removes has no other.
                folder = next((entry[0] for entry, made in changed.items() if made is not None), next(iter(changed))[0])
                self._pending.append(_Change(changed, folder))
                self._keep()
            return result

        return call

    def _fsync(self, descriptor: int) -> None:
        self._catch_up()
        self._restore["fsync"](descriptor)
        number = self._numbers.get(os.fstat(descriptor).st_ino)
        if number is None:
            return  # outside the tree
        if number in self._folders:
            for change in self._pending:
                if change.folder == number:
                    _apply(self._durable, change)
            self._pending = [change for change in self._pending if change.folder != number]
        else:
            self._flushed[number] = self._content[number]
        self._keep()

    def _catch_up(self) -> None:
        """Note what was written or made since the last event, by whatever means."""
        before, content = dict(self._names), dict(self._content)
        self._look()
        made = [(entry, number) for entry, number in self._names.items() if before.get(entry) != number]
        self._pending += [_Change({entry: number}, entry[0]) for entry, number in made]
        if made or content != self._content:
            self._keep()

    def _look(self) -> None:
        """Read the tree; what is in it gets a number that no other thing had before."""
        seen: dict[int, int] = {}
        self._names = {}
        places = [(self.root, self._number(self.root.stat().st_ino, seen))]
        self._folders.add(_ROOT)
        while places:
            path, folder = places.pop()
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                number = self._number(entry.inode(), seen)
                self._names[folder, entry.name] = number
                if stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                    self._folders.add(number)
                    places.append((Path(entry.path), number))
                else:
                    content = Path(entry.path).read_bytes()
                    if self._content.get(number) != content:  # what stays is kept once, not for every event
                        self._content[number] = content
        self._numbers = seen

    def _number(self, inode: int, seen: dict[int, int]) -> int:
        if inode in seen:
            return seen[inode]
        if inode in self._numbers:
            seen[inode] = self._numbers[inode]
        else:
            seen[inode], self._next = self._next, self._next + 1
        return seen[inode]

    def _keep(self) -> None:
        self._states.append(
            _State(
                dict(self._durable),
                tuple(self._pending),
                dict(self._flushed),
                dict(self._content),
                frozenset(self._folders),
                self._acknowledged,
            )
        )


def _apply(names: dict[Entry, int], change: _Change) -> None:
    for entry, what in change.entries.items():
        if what is None:
            names.pop(entry, None)
        else:
            names[entry] = what
