"""What is written to the log, and what never is.

Owns the one handler of the process, the two formats (`json` by python-json-logger, `text` for people) and the
rule that no payload, token, session id or query string reaches a line. Knows no Tornado, no Redis and nothing
else of the package; anyone may import it.

    logger = logging.getLogger("tornado_bcast.worker")
    logger.info("listening on %s", address, extra={"event": "listening"})

Third-party loggers are kept at WARNING, whatever the level of the package: at DEBUG redis-py's
"push_response" prints each delivery. Their warnings are defused as well. Tornado's quote request URIs
(`RequestHandler.log_exception`, web.py), the reprs of callbacks with their arguments (ioloop.py, gen.py) and
values from the request (`HTTPError(400, "Invalid unicode in ...")`); asyncio's quote tasks and their results.
"""

import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import FunctionType, MethodType, TracebackType
from typing import Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["json", "text"]
RefusalKind = Literal["origin", "rule", "limit"]

PACKAGE = "tornado_bcast"

_QUERY = re.compile(r"(?<=\S)\?\S+")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET = re.compile(r"\b(bearer|session)([. ]+)[\w.~+/=-]{16,}", re.IGNORECASE)
_ARGUMENTS = re.compile(r"\(.*\)", re.DOTALL)
_FIELDS = ("time", "level", "event", "message", "worker")
_NOT_EXTRA = frozenset(RESERVED_ATTRS) | frozenset(_FIELDS) | {"taskName", "clientId"}
# Seconds from one line about a failed TLS handshake to the next.
_HANDSHAKE_SECONDS = 60.0
# Exceptions whose text quotes the value that was wrong, so it may be a payload: only their type is printed.
_QUOTING = (ValueError, LookupError)


def scrub(text: str) -> str:
    """`text` without query strings, the credentials of URLs, bearer tokens and session ids.

    >>> scrub("GET /ws?token=abc (127.0.0.1)")
    'GET /ws (127.0.0.1)'
    """
    text = _QUERY.sub("", text)
    text = _CREDENTIALS.sub("***@", text)
    return _SECRET.sub(r"\1\2***", text)


def configure(
    format: LogFormat, level: str, *, worker: int | None = None, stream: TextIO | None = None
) -> logging.Handler:
    """Make `stream` (standard error unless given) the one place where the process logs; return its handler.

    `level` is that of the package (any case). Call it again after a fork with the number of the worker, and
    after a reload: what was configured before is replaced. Uncaught exceptions and warnings come in the same
    form, so that the output stays one object a line.
    """
    stream = sys.stderr if stream is None else stream
    handler = _Handler(stream, worker)
    handler.setFormatter(_json_formatter() if format == "json" else _TextFormatter(_wants_colour(stream)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level.upper())
    for name in ("tornado.access", "push_response"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    logging.captureWarnings(True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _log_uncaught
    return handler


class RefusalLog:
    """One line at INFO for each refusal, at most `per_second` a second; then how many were left out.

    Sans clock: `now` (seconds, of any steady clock) comes in. `sweep` belongs into the shared timer of the
    process, so that the count of the last second is told when no other refusal follows.
    """

    def __init__(self, logger: logging.Logger, per_second: int = 10) -> None:
        self._logger = logger
        self._per_second = per_second
        # Start of the present second, what was logged in it, and what was not.
        self._since = float("-inf")
        self._logged = 0
        self._left_out = 0

    def add(
        self,
        now: float,
        kind: RefusalKind,
        reason: str,
        *,
        client_id: str | None = None,
        setting: str | None = None,
        **details: str | int | None,
    ) -> None:
        """Log that `kind` refused something.

        `reason` is the sentence that the client gets, `setting` the INI key that decides (`[limits] rate`).
        `details` are further fields (`channel`, `origin`, `remote`); never a payload or a query string.
        """
        self.sweep(now)
        if self._logged >= self._per_second:
            self._left_out += 1
            return
        self._logged += 1
        extra = {"clientId": client_id, "kind": kind, "setting": setting, **details}
        self._logger.info(
            "refused: %s", scrub(reason), extra={"event": "refused", **_without_none(extra)}, stacklevel=2
        )

    def sweep(self, now: float) -> None:
        """Begin a new second when the present one is over, and say what was left out in it."""
        if now - self._since < 1:
            return
        if self._left_out:
            self._logger.info(
                "%d more refusals were not logged (at most %d a second)",
                self._left_out,
                self._per_second,
                extra={"event": "refusals_left_out", "leftOut": self._left_out},
            )
        self._since, self._logged, self._left_out = now, 0, 0


class _Handler(logging.StreamHandler[TextIO]):
    """The process's handler. It gives each record its fields and takes away what must not be printed."""

    def __init__(self, stream: TextIO, worker: int | None) -> None:
        super().__init__(stream)
        self._worker = worker
        # Until when (Unix seconds) nothing more is said of clients whose TLS handshake fails.
        self._handshakes_told = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_ours(record.name):
            return bool(super().filter(record))
        if record.name == "tornado.general" and str(record.msg).startswith("SSL Error on"):
            # Anybody can bring these about: whoever speaks plain HTTP to a TLS port.
            due = record.created >= self._handshakes_told
            if due:
                self._handshakes_told = record.created + _HANDSHAKE_SECONDS
            return due
        return record.levelno >= logging.WARNING and record.name not in ("tornado.access", "push_response")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            copy = logging.makeLogRecord(record.__dict__)
            message = record.getMessage() if _is_ours(record.name) else _defused_message(record)
            copy.msg, copy.args = message, None
            copy.exc_info = None
            copy.exc_text = _format_exception(record.exc_info[1]) if record.exc_info else None
            copy.stack_info = None
            created = datetime.fromtimestamp(record.created, UTC)
            copy.time = created.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            copy.level = record.levelname
            copy.event = getattr(record, "event", record.name.rpartition(".")[2])
            copy.worker = self._worker
            if getattr(copy, "clientId", None) is None:
                copy.__dict__.pop("clientId", None)
        except (
            Exception
        ):  # A bad format string or argument: as in the standard library, it never stops the caller.
            self.handleError(record)
            return
        super().emit(copy)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say where a line was lost. The standard library's answer prints the arguments."""
        kind = sys.exc_info()[0]
        if kind is None or issubclass(kind, OSError) or not logging.raiseExceptions:
            return  # The stream itself is gone.
        try:
            copy = logging.makeLogRecord({"name": PACKAGE, "levelno": logging.ERROR, "levelname": "ERROR"})
            copy.msg = (
                f"a log line of {record.pathname}:{record.lineno} could not be written: {kind.__name__}"
            )
            copy.time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            copy.level, copy.event, copy.worker = "ERROR", "log_failed", self._worker
            self.stream.write(self.format(copy) + self.terminator)
            self.flush()
        except Exception:
            return


def _json_formatter() -> logging.Formatter:
    return JsonFormatter(list(_FIELDS), rename_fields={"exc_info": "traceback"})


class _TextFormatter(logging.Formatter):
    """For people: the local time, the level, the worker, the event, the sentence, then the other fields."""

    _COLOURS: Mapping[str, str] = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        fields = record.__dict__
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        worker = "-" if fields["worker"] is None else f"w{fields['worker']}"
        level = self._paint(f"{record.levelname:<8}", self._COLOURS.get(record.levelname, "32"))
        message = _printable(record.getMessage())
        extras = {key: value for key, value in fields.items() if key not in _NOT_EXTRA and key[0] != "_"}
        if "clientId" in fields:
            extras = {"clientId": fields["clientId"], **extras}
        rest = "".join(f" {key}={_printable(str(value))}" for key, value in extras.items())
        line = (
            f"{self._paint(clock, '2')} {level} {worker:<4} {_printable(str(fields['event'])):<18} {message}"
        )
        line += self._paint(rest, "2") if rest else ""
        return f"{line}\n{record.exc_text}" if record.exc_text else line

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _printable(text: str) -> str:
    """`text` on one line, with control characters escaped: a client's words must not draw on a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def _defused_message(record: logging.LogRecord) -> str:
    """The message of a third-party record, with each argument made safe."""
    if record.name == "asyncio" or record.name.startswith("asyncio."):
        # The first line says what happened; the others are reprs of tasks, handles, transports and results.
        return _ARGUMENTS.sub("(...)", record.getMessage().partition("\n")[0])
    if record.msg == "%d %s: %s" and isinstance(record.args, tuple) and len(record.args) == 3:
        status, summary, message = record.args  # Tornado's log_exception of an HTTPError
        return f"{status} {scrub(str(summary))}: {str(message).partition(':')[0]}"
    if not record.args:
        return scrub(str(record.msg))
    if isinstance(record.args, Mapping):
        return scrub(str(record.msg) % {key: _safe_argument(value) for key, value in record.args.items()})
    return scrub(str(record.msg) % tuple(map(_safe_argument, record.args)))


def _safe_argument(value: object) -> object:
    """What may be printed of an argument: scrubbed text, numbers, and of all else only its name."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, functools.partial):
        return _safe_argument(value.func)
    if isinstance(value, (FunctionType, MethodType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, OSError):
        return str(value)
    return f"<{type(value).__name__}>"


def _format_exception(exc: BaseException | None) -> str | None:
    """The traceback, with the causes first; the text of an exception only where it cannot be a payload."""
    if exc is None:
        return None
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = "" if isinstance(link, _QUOTING) else scrub(str(link))
        name = type(link).__qualname__
        frames = "".join(traceback.format_tb(link.__traceback__))
        head = f"Traceback (most recent call last):\n{frames}" if frames else ""
        parts.append(f"{head}{name}: {_printable(text)}" if text else f"{head}{name}")
        if isinstance(link, BaseExceptionGroup):
            parts.extend(filter(None, (_format_exception(inner) for inner in link.exceptions)))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n\n".join(reversed(parts))


def _without_none(fields: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {key: value for key, value in fields.items() if value is not None}


def _log_uncaught(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, Exception):  # Ctrl-C and SystemExit have their own way.
        sys.__excepthook__(kind, exc, trace)
        return
    logger = logging.getLogger(PACKAGE)
    logger.critical("stopped by an error that nobody caught", exc_info=exc, extra={"event": "crash"})
