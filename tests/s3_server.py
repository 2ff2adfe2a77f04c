"""An S3 service for tests on this machine: moto's, with a way to count requests and to lose answers."""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
import requests
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import make_server

BUCKET = "cohorts"


class S3Server:
    """moto behind a real port of 127.0.0.1."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()  # moto's conditional writes look first and write then
        self.requests: Counter[str] = Counter()
        self.ignores_conditions = False
        self.lost: Callable[[str, str], bool] = lambda method, path: False
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        requests.put(f"{self.url}/{BUCKET}", timeout=10).raise_for_status()

        self._client = S3Store(
            BUCKET,
            endpoint=self.url,
            region="us-east-1",
            access_key_id="spoiler",
            secret_access_key="another",
            client_options={"allow_http": True},
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
            "AWS_REGION": "us-east-1",
        }

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def losing(self, lost: Callable[[str, str], bool]):
        """Within the block, requests of a method and path that `lost` says are done but answered with a failure."""
        self.lost = lost
        try:
            yield
        finally:
            self.lost = lambda method, path: False

    @contextmanager
    def counting(self):
        """A `Counter` of the requests within the block, by kind."""
        before = self.requests.copy()
        made: Counter[str] = Counter()
        yield made
        made.update(self.requests - before)

    def objects(self) -> dict[str, Any]:
        """moto's own objects by key, to look at and to spoil."""
        return get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys

    def spoil(self, key: str, content: bytes) -> None:
        """Another content in place of an object's."""
        obstore.put(self._client, key, content)

    def delete(self, key: str) -> None:
        """Lose an object."""
        obstore.delete(self._client, key)

    def add_name(self, key: str, name: str) -> None:
        """The object `key` under a name as well that no client of ours would send."""
        found = copy.copy(self.objects()[key])
        found.name = name
        self.objects()[name] = found

    def age(self, folder: str, seconds: float) -> None:
        """Let the objects below a folder have been written longer ago."""
        for key, found in self.objects().items():
            if key.startswith(folder):
                found.last_modified -= timedelta(seconds=seconds)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        listing = method == "GET" and path.strip("/") == BUCKET
        self.requests["LIST" if listing else method] += 1
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with self._one_at_a_time:
            if not self.lost(method, path):
                return list(self._moto(environ, start))
            list(self._moto(environ, lambda status, headers, *more: None))
        start("503 Slow Down", [("Content-Length", "0")])
        return []
