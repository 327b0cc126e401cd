"""What a new configuration changes: what running workers take over, what only new ones do, what none can.

Pure: two configurations in, a Change out. The parent (daemon.py) acts on it: it shows `handed` to the workers
on the board and tells them by SIGHUP, and forks their successors with `config`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .config import ChannelRule, ChannelsConfig, Config
from .settings import SETTINGS, Setting
from .values import masked

# Sections that a running worker takes over: keys, origins, limits and channel rules.
_TAKEN = ("auth", "cors", "limits", "channels")
# What is made before the first worker, or would part the workers from each other.
_FIXED = (
    ("server", "bind"),
    ("server", "port"),
    ("server", "workers"),
    ("redis", "url"),
    ("redis", "prefix"),
    ("redis", "appendfsync"),
    ("redis", "data_dir"),
)


@dataclass(frozen=True, slots=True)
class Change:
    """`config` holds from now on, `handed` for the workers that run. The rest is sentences for the log."""

    config: Config
    handed: Config
    # Taken over by running workers.
    taken: tuple[str, ...]
    # Taken over by the successors of the workers.
    replacing: tuple[str, ...]
    # Not taken over before a restart.
    fixed: tuple[str, ...]


def compare(old: Config, new: Config) -> Change:
    """What is to be done about `new`."""
    taken: list[str] = []
    replacing: list[str] = []
    fixed: list[str] = []
    for row in SETTINGS:
        before, after = (getattr(_section(config, row), row.key) for config in (old, new))
        if before != after:
            kind = fixed if (row.section, row.key) in _FIXED else replacing
            (taken if row.section in _TAKEN else kind).append(_sentence(row, before, after))
    taken += _rule_changes(old.channels, new.channels)
    config = new
    for section, key in _FIXED:
        kept = getattr(getattr(old, section), key)
        config = replace(config, **{section: replace(getattr(config, section), **{key: kept})})
    handed = take_over(old, new)
    if _persistence(old.channels) != _persistence(new.channels):
        # Whoever listens to a channel stands in its history or does not: that begins anew in a new worker.
        replacing.append("which channels are persistent")
        handed = replace(handed, channels=old.channels)
    return Change(config, handed, tuple(taken), tuple(replacing), tuple(fixed))


def take_over(running: Config, handed: Config) -> Config:
    """The configuration of a worker that takes over what it can."""
    return replace(running, **{section: getattr(handed, section) for section in _TAKEN})


def _section(config: Config, row: Setting) -> object:
    section = getattr(config, row.section)
    return section.default if row.rule else section


def _sentence(row: Setting, before: object, after: object) -> str:
    old, new = (masked(row.kind, value) or "(not set)" for value in (before, after))
    name = f"[{row.section}] {row.key}"
    return f"{name}: {old} -> {new}" if old != new else f"{name}: {new}, with other contents"


def _rule_changes(old: ChannelsConfig, new: ChannelsConfig) -> Iterator[str]:
    before, after = ({rule.pattern: rule for rule in channels.rules} for channels in (old, new))
    for pattern in dict.fromkeys((*before, *after)):
        if before.get(pattern) != after.get(pattern):
            what = "changed" if pattern in before and pattern in after else "is new"
            yield f"[channel {pattern}] {what if pattern in after else 'is gone'}"
    if before.keys() == after.keys() and list(before) != list(after):
        yield "the order of the sections [channel GLOB]"


def _persistence(channels: ChannelsConfig) -> list[tuple[str, bool]]:
    """The rules that decide which channels are persistent, without those that make no difference to it."""
    kept: list[ChannelRule] = []
    for rule in reversed(channels.rules):
        below = [other for other in kept if other.persistent != rule.persistent]
        if rule.persistent != channels.default.persistent or any(_may_meet(rule, other) for other in below):
            kept.append(rule)
    return [("", channels.default.persistent), *((rule.pattern, rule.persistent) for rule in kept)]


def _may_meet(one: ChannelRule, other: ChannelRule) -> bool:
    """Whether a name may match both globs: False only where their beginnings differ."""
    first, second = (rule.pattern.replace("?", "*").partition("*")[0] for rule in (one, other))
    return first.startswith(second) or second.startswith(first)
