"""Text to values and back: the kinds of value that a configuration key can have.

A `Kind` reads the text of a key and shows its value again, each way in one place: files, variables, the
command line, defaults, `check-config` and the documentation all go through it. Nothing here knows a key, a
file or the environment. `read` raises ValueError with a sentence that never repeats a secret.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

# What a secret is shown as.
MASK = "***"

# Channel names (rules.py) and the two signs.
_GLOB = re.compile(r"[A-Za-z0-9_\-.:@=+/~*?]{1,255}")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)?")
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_SIZE = re.compile(r"([0-9]{1,15})([kmgKMG])?")
_BYTES = {"g": 1 << 30, "m": 1 << 20, "k": 1 << 10}
_BOOLEANS = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of value is written.

    `read` is given text without white space around it, and raises ValueError; `show` undoes it. `lines`: the
    value may stand on several lines. `verbatim`: a `#` in it is no comment. `secret`: it is never shown.
    """

    read: Callable[[str], Any]
    show: Callable[[Any], str] = str
    lines: bool = False
    verbatim: bool = False
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """A value of [auth]: its text, which may be secret, and the path of the file that it was read from."""

    text: str = field(repr=False)
    path: str | None = None


def is_glob(text: str) -> bool:
    """Whether this is a glob of channel names."""
    return _GLOB.fullmatch(text) is not None


def printable(text: str) -> str:
    """The text as it may stand in a sentence: short, on one line, nothing that a terminal would obey."""
    short = text if len(text) <= 80 else text[:79] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


def quote(text: str) -> str:
    return f"`{printable(text)}`"


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest valid one, or all where none is near."""
    names = list(valid)
    near = nearest(name, names)
    return f"; did you mean `{near}`?" if near else f"; valid: {', '.join(names)}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like this one, if any does."""
    return next(iter(get_close_matches(name[:80].lower(), valid, 1)), None)


def duration(low: float = 0, high: float = 366 * 86400) -> Kind:
    """A time in seconds, as float."""

    def read(text: str) -> float:
        match = _DURATION.fullmatch(text)
        if not match:
            raise ValueError(f"{quote(text)} is no duration: write `250ms`, `5s`, `10m`, `1h` or `2d`")
        number, unit = match.groups()
        seconds = float(number) / 1000 if unit == "ms" else float(number) * _SECONDS[unit or "s"]
        if not low <= seconds <= high:
            raise ValueError(
                f"{quote(text)} is out of range: {_show_duration(low)} to {_show_duration(high)}"
            )
        return seconds

    return Kind(read, _show_duration)


def _show_duration(seconds: float) -> str:
    for unit, length in _SECONDS.items():
        if seconds >= length and seconds % length == 0:
            return f"{int(seconds / length)}{unit}"
    return f"{_show_number(seconds * 1000)}ms" if seconds else "0s"


def size() -> Kind:
    """A number of bytes, up to 1 GiB."""

    def read(text: str) -> int:
        match = _SIZE.fullmatch(text)
        if not match:
            raise ValueError(f"{quote(text)} is no size: write `512`, `64k` or `1m`")
        number = int(match[1]) * _BYTES.get((match[2] or "").lower(), 1)
        if number > _BYTES["g"]:
            raise ValueError(f"{quote(text)} is out of range: 0 to 1g")
        return number

    def show(number: int) -> str:
        for unit, length in _BYTES.items():
            if number >= length and number % length == 0:
                return f"{number // length}{unit}"
        return str(number)

    return Kind(read, show)


def whole(low: int, high: int) -> Kind:
    """A whole number, as int."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,15}", text):
            raise ValueError(f"{quote(text)} is no whole number")
        if not low <= int(text) <= high:
            raise ValueError(f"{quote(text)} is out of range: {low} to {high}")
        return int(text)

    return Kind(read)


def number(high: float) -> Kind:
    """A number from 0, as float."""

    def read(text: str) -> float:
        if not re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]{1,6})?", text):
            raise ValueError(f"{quote(text)} is no number")
        if not 0 <= float(text) <= high:
            raise ValueError(f"{quote(text)} is out of range: 0 to {_show_number(high)}")
        return float(text)

    return Kind(read, _show_number)


def _show_number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def boolean() -> Kind:
    """`yes` or `no`, and their usual other spellings."""

    def read(text: str) -> bool:
        try:
            return _BOOLEANS[text.lower()]
        except KeyError:
            raise ValueError(f"{quote(text)} is neither yes nor no{suggest(text, _BOOLEANS)}") from None

    return Kind(read, lambda value: "yes" if value else "no")


def choice(*names: str, folded: bool = False) -> Kind:
    """One of a few names; `folded`: in any case, and the value is in capitals."""

    def read(text: str) -> str:
        name = text.lower() if folded else text
        if name not in names:
            raise ValueError(f"{quote(text)} is unknown here{suggest(text, names)}")
        return name.upper() if folded else name

    return Kind(read, str.lower if folded else str)


def auto(kind: Kind) -> Kind:
    """The same kind, or `auto`, read as None: found out at the start."""

    def read(text: str) -> Any:
        if text == "auto":
            return None
        try:
            return kind.read(text)
        except ValueError as error:
            raise ValueError(f"{error} (or `auto`)") from None

    return Kind(read, lambda value: "auto" if value is None else kind.show(value))


def path(absolute: bool = False) -> Kind:
    """The path of a file or directory, or None; whether it is there is looked at by whoever needs it.

    `absolute`: it must begin with `/`, or with `~` for a home directory.
    """

    def read(text: str) -> str | None:
        if not text.isprintable():
            raise ValueError(f"{quote(text)} has a character that no path should have")
        if text[:1] in ("'", '"'):
            raise ValueError(f"{quote(text)}: values are written without quotation marks")
        if absolute and text and text[0] not in "/~":
            raise ValueError(f"{quote(text)} is not an absolute path")
        return text or None

    return Kind(read, lambda value: value or "")


def verbatim_lines(secret: bool = False, files: bool = False) -> Kind:
    """Values as `Given`, one a line and each taken as it is; a PEM text is one value.

    `file:PATH` stands for what is in a file, which is read later; `files`: every value is a path.
    """

    def read(text: str) -> tuple[Given, ...]:
        values: list[Given] = []
        pem: list[str] = []
        for line in filter(None, map(str.strip, text.split("\n"))):
            if pem or (line.startswith("-----BEGIN ") and not secret):
                pem.append(line)
                if line.startswith("-----END "):
                    values.append(Given("\n".join(pem)))
                    pem = []
            elif files or line.startswith("file:"):
                name = line.removeprefix("file:").strip()
                if not name or not name.isprintable():
                    raise ValueError("`file:` needs the path of a file")
                values.append(Given("", name))
            else:
                values.append(Given(line))
        if pem:
            raise ValueError("a PEM text ends with `-----END ...-----`")
        return tuple(values)

    def show(values: tuple[Given, ...]) -> str:
        return ", ".join(
            dict.fromkeys(
                f"file:{value.path}" if value.path else MASK if secret else printable(value.text)
                for value in values
            )
        )

    return Kind(read, show, lines=True, verbatim=True, secret=secret)


def prefix() -> Kind:
    """What the keys in Redis begin with. Braces would move the hash tag; glob signs would widen a SCAN."""

    def read(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,64}", text):
            raise ValueError(f"{quote(text)} must be 1 to 64 of A-Z a-z 0-9 _ - . : / (no braces)")
        return text

    return Kind(read)


def masked(kind: Kind, value: Any) -> str:
    """The value as it may be shown to anybody who may see the configuration; empty where it is not set.

    A kind that is secret masks itself, but for the paths of files.
    """
    return kind.show(value)
