"""An HTTP server that answers by a script, for tests of publishing."""

import json
import socket
import threading
import time
from typing import Any


def answer(status: int, body: Any, *headers: str) -> bytes:
    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def error(status: int, code: str, message: str, *headers: str) -> bytes:
    return answer(status, {"error": {"code": code, "message": message}}, *headers)


TAKEN = answer(200, {"results": [{"channel": "news", "messageId": "m1"}]})
DUPLICATE = answer(200, {"results": [{"channel": "news", "messageId": "m1", "duplicate": True}]})
BUSY = error(503, "unavailable", "Redis is away.")


class Scripted:
    """Answers each request with the next part of the script, for ever with the last one. b"" hangs up."""

    def __init__(self, *script: bytes, port: int = 0) -> None:
        self._script = list(script)
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[tuple[float, str, dict[str, str], dict[str, Any]]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer, peer.makefile("rb") as reader:
                line = reader.readline().decode().strip()
                headers = {}
                while header := reader.readline().decode().strip():
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(reader.read(int(headers["content-length"])))
                self.requests.append((time.monotonic(), line, headers, body))
                peer.sendall(self._script.pop(0) if len(self._script) > 1 else self._script[0])

    @property
    def ids(self) -> set[str]:
        return {body["messageId"] for *_, body in self.requests}
