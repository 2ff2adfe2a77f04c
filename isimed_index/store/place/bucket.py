"""A bucket that speaks S3, by the few requests that a store needs; the only module that imports obstore.

Endpoint, region and credentials come from the usual variables (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`
and others). obstore asks again after failures that may pass; what fails for good becomes an error of ours, without the
words of the service: those name hosts and keys.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from isimed_index.errors import MissingExtra, StoreNotFound, StoreReadOnly, StoreUnreachable, UsageError

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import S3Store

SCHEME = "s3://"
_URL = re.compile(r"s3:/{1,2}(?P<bucket>[a-z0-9][a-z0-9.-]{1,62})(?:/(?P<prefix>[^\x00-\x1f?#]*))?")
_STATUS = re.compile(r"status code: (\d{3})")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CHUNK_BYTES = 16 << 20  # of an upload in parts
_RETRIES = 5
_PATIENCE = timedelta(seconds=60)  # for all attempts of one request
_CHECK = "check AWS_ENDPOINT_URL, AWS_REGION, the credentials and the network, then run the command again"


@dataclass(frozen=True, slots=True)
class Found:
    """An object of a bucket."""

    key: str  # relative to the bucket's prefix
    size: int  # bytes
    modified: datetime  # by the clock of the service
    etag: str | None  # another one after every change of the content


class Bucket:
    """The objects below `s3://bucket/prefix`; keys are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = _URL.fullmatch(url)
        if parts is None:
            raise UsageError("expected s3://BUCKET/PREFIX", next_step="isimed ls -s s3://my-bucket/cohort.isimed")
        self.bucket = parts["bucket"]
        self.prefix = (parts["prefix"] or "").strip("/")

    @property
    def name(self) -> str:
        """For messages: the last part of the prefix, or the bucket."""
        return self.prefix.rpartition("/")[2] or self.bucket

    def get(self, key: str) -> bytes:
        """An object's content; `FileNotFoundError` when there is none."""
        with self._asking(key, "read") as store:
            return bytes(store.get(key).bytes())

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the object; `length` must not be 0."""
        with self._asking(key, "read") as store:
            return bytes(store.get_range(key, start=start, length=length))

    def head(self, key: str) -> Found:
        """What is known of an object without reading it; `FileNotFoundError` when there is none."""
        with self._asking(key, "read") as store:
            found = store.head(key)
        return Found(found["path"], found["size"], found["last_modified"], found["e_tag"])

    def list(self, folder: str) -> list[Found]:
        """Every object below a folder, in any order; an object of the folder's own name is not among them."""
        with self._asking(folder, "read") as store:
            found = store.list(folder or None).collect()
        return [Found(one["path"], one["size"], one["last_modified"], one["e_tag"]) for one in found]

    def names(self, folder: str) -> Sequence[str]:
        """Names of objects and folders in a folder, sorted."""
        with self._asking(folder, "read") as store:
            found = store.list_with_delimiter(folder or None)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

    def put(self, key: str, content: bytes) -> str | None:
        """Write an object in one step, in place of another; its new etag."""
        with self._asking(key, "write") as store:
            return store.put(key, content, use_multipart=False)["e_tag"]

    def create(self, key: str, content: bytes) -> str | None:
        """Write an object only if there is none (`If-None-Match: *`); `FileExistsError` otherwise."""
        with self._asking(key, "write") as store:
            return store.put(key, content, mode="create", use_multipart=False)["e_tag"]

    def swap(self, key: str, content: bytes, etag: str | None) -> str | None:
        """Write an object only if it is the one with `etag` (`If-Match`); `FileExistsError` when it is another."""
        with self._asking(key, "write") as store:
            mode: UpdateVersion = {"e_tag": etag}
            return store.put(key, content, mode=mode, use_multipart=False)["e_tag"]

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object, in parts when it is large; each request is signed with the hash of its body."""
        with self._asking(key, "write") as store:
            store.put(key, path, chunk_size=_CHUNK_BYTES, max_concurrency=4)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        if keys:
            with self._asking("", "write") as store:
                store.delete(list(keys))

    def copy(self, key: str, target: str) -> None:
        """Copy an object within the bucket, in place of another; `FileNotFoundError` when there is none."""
        with self._asking(key, "write") as store:
            store.copy(key, target)

    @cached_property
    def _store(self) -> S3Store:
        try:
            from obstore.store import S3Store
        except ImportError:
            raise MissingExtra(
                "a store on S3 needs the package obstore", next_step="pip install 'isimed-index[s3]'"
            ) from None
        return S3Store(
            self.bucket,
            prefix=self.prefix or None,
            client_options={"allow_http": _plain_http(), "timeout": "10m", "read_timeout": "30s"},
            retry_config={"max_retries": _RETRIES, "retry_timeout": _PATIENCE},
        )

    @contextmanager
    def _asking(self, key: str, doing: str) -> Iterator[S3Store]:
        """Raise what the standard library would for a file, or an error of ours; never the text of the service."""
        store = self._store
        from obstore.exceptions import BaseError

        try:
            yield store
        except (BaseError, FileNotFoundError) as error:
            raise self._fault(error, key, doing) from None

    def _fault(self, error: Exception, key: str, doing: str) -> Exception:
        text, kind = str(error), type(error).__name__
        name = key.rpartition("/")[2]
        if "NoSuchBucket" in text:
            return StoreNotFound(f"there is no bucket {self.bucket}", next_step="make the bucket, or name another")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if kind in ("AlreadyExistsError", "PreconditionError"):
            return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        if kind in ("PermissionDeniedError", "UnauthenticatedError"):
            if doing == "write":
                return StoreReadOnly(
                    f"the service refused to let these credentials write to the store {self.name}",
                    next_step="use credentials that may list, read, write and delete there",
                )
            return StoreUnreachable(
                f"the service refused to let these credentials read the store {self.name}", next_step=_CHECK
            )
        status = _STATUS.search(text)
        found = f"the service answered with HTTP status {status[1]}" if status else "the service did not answer"
        return StoreUnreachable(f"the store {self.name} cannot be reached: {found}", next_step=_CHECK)


def _plain_http() -> bool:
    """Whether the endpoint is asked without TLS: on this machine, or where `AWS_ALLOW_HTTP` says so."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(endpoint)
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not allowed:
        raise UsageError(
            "AWS_ENDPOINT_URL is plain http, by which anyone on the way can read patient data",
            next_step="use https, or set AWS_ALLOW_HTTP=true",
        )
    return parts.scheme == "http"
