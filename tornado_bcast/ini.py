"""The INI text of the daemon: sections, keys and values with the line of each, and what is wrong with it.

Owns the syntax only; which names exist and what a value means is the business of config.py. The standard
library's `configparser` stops at the first duplicate and forgets where a value stood, so this is a reader of
its own, of the same language but stricter:

    # a comment, also with ;
    [section]
    key = value        ; a comment again, where white space stands before the sign
    other =
        first value
        second value

A line that is indented deeper than its key continues the value. Names are compared with case.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

# No configuration is larger; more is a file given by mistake.
MAX_BYTES = 1 << 20
# Whoever has more than this many faults has given the wrong file; the rest is not looked at.
MAX_FAULTS = 20

_BLANK = " \t"


@dataclass(slots=True)
class IniLine:
    """One line of a value, without the white space around it."""

    number: int
    text: str

    @property
    def without_comment(self) -> str:
        """The text up to a `#` or `;` that stands behind white space (or begins the value)."""
        for index, char in enumerate(self.text):
            if char in "#;" and (index == 0 or self.text[index - 1] in _BLANK):
                return self.text[:index].rstrip(_BLANK)
        return self.text


@dataclass(slots=True)
class IniKey:
    """A key and the lines of its value; the first is that of the key itself and may be empty."""

    name: str
    number: int
    lines: list[IniLine]


@dataclass(slots=True)
class IniSection:
    """A section; runs of white space in its name are one space."""

    name: str
    number: int
    keys: list[IniKey] = field(default_factory=list)


@dataclass(slots=True)
class IniFault:
    """What is wrong with a line."""

    number: int
    sentence: str


def parse_ini(data: bytes) -> tuple[list[IniSection], list[IniFault]]:
    """Read a whole file. Never raises: what cannot be read is a fault, and its line is left out."""
    if len(data) > MAX_BYTES:
        return [], [IniFault(1, f"the file is larger than {MAX_BYTES >> 20} MiB, this is no configuration")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return [], [IniFault(line, f"the file is not UTF-8 text (byte 0x{data[error.start]:02x})")]
    reader = _Reader()
    # Not splitlines(): it breaks at characters that no editor counts as the end of a line.
    for number, content in enumerate(text.split("\n"), 1):
        reader.read_line(number, content.removesuffix("\r"))
        if len(reader.faults) >= MAX_FAULTS:
            break
    faults = sorted([*reader.faults, *_duplicates(reader.sections)], key=lambda fault: fault.number)[
        :MAX_FAULTS
    ]
    if len(faults) == MAX_FAULTS:
        return [], [
            *faults,
            IniFault(faults[-1].number, "too many faults, the rest of the file was not checked"),
        ]
    return reader.sections, faults


class _Reader:
    """Takes the lines in order."""

    def __init__(self) -> None:
        self.sections: list[IniSection] = []
        self.faults: list[IniFault] = []
        # Where the next line belongs. After a bad header: a section that nobody keeps, so that one fault is
        # not told again for each key below it.
        self._section: IniSection | None = None
        # The key that a deeper line continues, and how far it is indented itself.
        self._key: IniKey | None = None
        self._indent = 0

    def read_line(self, number: int, line: str) -> None:
        bad = next((char for char in line if (char < " " and char != "\t") or char == "\x7f"), None)
        if bad is not None:
            self.faults.append(
                IniFault(number, f"has the control character 0x{ord(bad):02x}, this is no text")
            )
            return
        text = line.strip(_BLANK)
        if not text or text[0] in "#;":
            return
        indent = len(line) - len(line.lstrip(_BLANK))
        if self._key is not None and indent > self._indent:
            self._key.lines.append(IniLine(number, text))
        elif text[0] == "[":
            self._begin_section(number, text)
        else:
            self._begin_key(number, text, indent)

    def _begin_section(self, number: int, text: str) -> None:
        header = IniLine(number, text).without_comment
        name = " ".join(header[1:-1].split())
        self._key = None
        self._section = IniSection(name, number)
        if not header.endswith("]"):
            self.faults.append(IniFault(number, "a section is written `[name]`, the `]` is missing"))
        elif not name:
            self.faults.append(IniFault(number, "the section has no name"))
        else:
            self.sections.append(self._section)

    def _begin_key(self, number: int, text: str, indent: int) -> None:
        name, equals, value = text.partition("=")
        name = name.rstrip(_BLANK)
        self._key = IniKey(name, number, [IniLine(number, value.strip(_BLANK))])
        self._indent = indent
        if self._section is None:
            self._section = IniSection("", number)
            self.faults.append(IniFault(number, "a `[section]` must stand before the first key"))
        elif not equals:
            self.faults.append(
                IniFault(number, "this line is neither `[section]` nor `key = value` nor a comment")
            )
        elif not name:
            self.faults.append(IniFault(number, "there is no key before the `=`"))
        else:
            self._section.keys.append(self._key)


def _duplicates(sections: list[IniSection]) -> Iterator[IniFault]:
    first_sections: dict[str, int] = {}
    for section in sections:
        first = first_sections.setdefault(section.name, section.number)
        if first != section.number:
            yield IniFault(
                section.number, f"[{section.name}]: the section stands here twice, first on line {first}"
            )
        first_keys: dict[str, int] = {}
        for key in section.keys:
            first = first_keys.setdefault(key.name, key.number)
            if first != key.number:
                yield IniFault(
                    key.number,
                    f"[{section.name}] {key.name}: the key stands here twice, first on line {first}",
                )
