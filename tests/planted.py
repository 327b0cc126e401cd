"""What no log may have in it: the secrets and payloads that the clients of the tests send and are told.

`client.py` notes them as they go by, and `daemon.py` looks for them in all that a daemon has written, at
DEBUG, when it ends. So every test that talks to a daemon is a test of this as well, in each of xdist's
processes for itself. `test_privacy.py` goes through the entrances one by one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

# Shorter ones stand in a log by chance. Tokens, keys and ids have at least one run of so many.
_WORD = re.compile(r"[\w-]{16,}")
_HEADERS = ("authorization", "x-api-key", "sec-websocket-protocol", "cookie")


class Planted:
    """The words of secrets, so that a log is gone through once, however many there are."""

    def __init__(self) -> None:
        self._words: set[str] = set()

    def add(self, *texts: object) -> None:
        for text in texts:
            self._words.update(_WORD.findall(str(text)))

    def add_request(self, path: str, headers: Mapping[str, Any] | None, body: object = None) -> None:
        """What is secret of an HTTP request: its query, who asks, and the payloads of its body."""
        self.add(urlsplit(path).query.partition("epoch=")[0])
        self.add(*(value for name, value in (headers or {}).items() if name.lower() in _HEADERS))
        if isinstance(body, (str, bytes)):
            try:
                body = json.loads(body)
            except (ValueError, RecursionError):
                return
        self.add(*_payloads(body))

    def add_frame(self, frame: Any) -> None:
        """The same of a frame, of either side."""
        if isinstance(frame, dict):
            self.add(frame.get("token", ""), frame.get("session", ""), *_payloads(frame))

    def found_in(self, text: str) -> set[str]:
        return self._words.intersection(_WORD.findall(text))


def _payloads(body: Any) -> Iterator[str]:
    if isinstance(body, dict):
        yield json.dumps(body.get("data"), ensure_ascii=False)
        for item in body.get("messages") or () if isinstance(body.get("messages"), list) else ():
            yield from _payloads(item)


PLANTED = Planted()
