"""The promises that the project makes about itself: its layers, its documents, what it ships."""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tornado.web import RequestHandler

from tornado_bcast import __version__
from tornado_bcast.cli import build_parser
from tornado_bcast.errors import HTTP_STATUS, CloseCode, ErrorCode
from tornado_bcast.handlers import make_routes
from tornado_bcast.handlers.context import Context

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tornado_bcast"

# The rooms from top to bottom (docs/ARCHITECTURE.md). A module imports from lines below its own, never from
# its own line or above. A new module needs a place here.
LAYERS = """
cli
daemon tail
watch
application
worker
handlers
handlers.websocket handlers.broadcast handlers.status
handlers.connection
handlers.outgoing
handlers.subscriptions handlers.wire
handlers.base
handlers.context
node keeper overload
dispatch
session topic reader
brokers.redis
brokers.redis_bridge brokers.redis_canary brokers.redis_sessions
brokers.redis_commands
brokers.redis_pipeline
brokers.redis_link brokers.memory brokers.embedded
brokers.redis_wire
brokers hub acceptor client forks
publishing
sink delivery protocol metrics heartbeat board
stream
auth reload compression
rules wheel frames farewell
config
reading cores
settings ini keys
addresses
systemd
values errors logs direct capacity tasks answer eventloop
__init__
"""

# In C, with a stand-in in Python.
EXTENSIONS = {"_speedups"}
# No sockets, no clock, no loop: these are fed, and asked.
SANS_IO = """
protocol rules session delivery hub topic frames compression wheel heartbeat metrics errors farewell overload
"""
IO = {"asyncio", "tornado", "redis", "socket", "ssl", "time", "threading", "select", "selectors"}


def name_of(path: Path) -> str:
    """The module's name below the package: `brokers` for brokers/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, at any place; those of the package begin with a dot."""
    package = name.split(".") if name in ("handlers", "brokers") else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_relative(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield _relative(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            base = [*above, *(node.module.split(".") if node.module else [])]
            inner = [".".join([*base, alias.name]) for alias in node.names]
            # `from . import client` names modules, `from .client import publish` does not.
            found = [one for one in inner if one in modules()]
            yield from ("." + one for one in (found or [".".join(base) or "__init__"]))


def _relative(name: str) -> str:
    if name != "tornado_bcast" and not name.startswith("tornado_bcast."):
        return name
    return "." + (name.removeprefix("tornado_bcast").removeprefix(".") or "__init__")


def without_types(tree: ast.Module) -> ast.Module:
    """A module as it runs: without what stands under `if TYPE_CHECKING`."""
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
    ]
    return ast.Module(body, [])


RANKS = {name: rank for rank, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}


class TestLayers:
    def test_every_module_has_its_place(self) -> None:
        assert set(RANKS) == set(modules()), "put it on a line of LAYERS, and into docs/ARCHITECTURE.md"

    @pytest.mark.parametrize("name", list(modules()))
    def test_imports_run_downward(self, name: str) -> None:
        found = {one.removeprefix(".") for one in imports(name, modules()[name]) if one.startswith(".")}
        climbing = {one for one in found - EXTENSIONS if RANKS[one] <= RANKS[name]}
        assert not climbing, f"{name} imports what stands beside or above it"

    @pytest.mark.parametrize("name", SANS_IO.split())
    def test_no_io_in_the_core(self, name: str) -> None:
        used = {one.split(".")[0] for one in imports(name, without_types(modules()[name]))}
        assert not used & IO

    def test_a_sink_knows_streams_only(self) -> None:
        used = {one for one in imports("sink", modules()["sink"]) if one.split(".")[0] in IO}
        assert used == {"tornado.iostream"}

    def test_redis_is_in_one_place(self) -> None:
        users = {
            name
            for name, tree in modules().items()
            if any(one.split(".")[0] in ("redis", "hiredis") for one in imports(name, tree))
        }
        assert {name for name in users if not name.startswith("brokers.redis")} == set()
        assert users

    def test_handlers_are_in_one_place(self) -> None:
        """The only RequestHandlers and the only WebSocketHandler."""
        handlers = {
            (name, node.name)
            for name, tree in modules().items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for base in node.bases
            if getattr(base, "id", "").endswith("Handler")
            and not getattr(base, "id", "").startswith("Stream")
        }
        assert {name for name, _ in handlers if not name.startswith("handlers.")} == set()
        sockets = [
            node.name
            for name, tree in modules().items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and any(getattr(base, "id", "") == "WebSocketHandler" for base in node.bases)
        ]
        assert len(sockets) == 1


class TestModules:
    def test_names_say_what_is_inside(self) -> None:
        words = {"util", "utils", "helper", "helpers", "manager", "managers", "common", "misc", "base_utils"}
        assert not [name for name in modules() if set(re.split(r"[._]", name)) & words]

    @pytest.mark.parametrize(
        "path", [*sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.rglob("*.lua"))], ids=str
    )
    def test_files_are_short(self, path: Path) -> None:
        assert len(path.read_text().splitlines()) <= 400

    def test_every_module_says_what_it_owns(self) -> None:
        for name, tree in modules().items():
            assert ast.get_docstring(tree), name

    def test_documents_that_are_named_exist(self) -> None:
        for path in [*PACKAGE.rglob("*.py"), PACKAGE / "page.html"]:
            for name in re.findall(r"\bdocs/[\w.-]+\.(?:md|yaml)", path.read_text()):
                assert (ROOT / name).exists(), f"{path}: {name}"

    def test_versions_agree(self) -> None:
        assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
        for name in ("openapi", "asyncapi"):
            assert document(name)["info"]["version"] == __version__
        assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()

    def test_nothing_of_the_machine_that_it_was_made_on(self) -> None:
        words = ["/" + "work/", "/" + "root/", ".lib" + "rary"]
        for path in tracked():
            text = path.read_text(errors="replace") if path.is_file() else ""
            assert not [word for word in words if word in text], path


@cache
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines()]


# Documents


def document(name: str) -> Any:
    return yaml.safe_load((ROOT / "docs" / f"{name}.yaml").read_text())


def pages() -> list[Path]:
    """Every page that people read."""
    return sorted(
        [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").glob("*.md"),
            *(ROOT / "tests/vectors").glob("*.md"),
            ROOT / "sdk/react/README.md",
        ]
    )


PROTOCOL = (ROOT / "docs/PROTOCOL.md").read_text()


def row_of(first: str, text: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \|.*$", text, re.MULTILINE)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


class TestProtocol:
    @pytest.mark.parametrize("code", get_args(ErrorCode))
    def test_error_codes(self, code: ErrorCode) -> None:
        cells = row_of(f"`{code}`", PROTOCOL)
        assert len(cells) == 4 and all(cells)
        assert cells[1] in (str(HTTP_STATUS[code]), "-")

    def test_error_codes_of_the_schemas(self) -> None:
        codes = list(get_args(ErrorCode))
        assert list(HTTP_STATUS) == codes
        assert document("openapi")["components"]["schemas"]["ErrorCode"]["enum"] == codes
        assert document("asyncapi")["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == codes

    @pytest.mark.parametrize("code", list(CloseCode), ids=lambda code: code.name)
    def test_close_codes(self, code: CloseCode) -> None:
        cells = row_of(str(int(code)), PROTOCOL)
        assert len(cells) == 4 and all(cells)
        assert f"{int(code)} " in " ".join(document("asyncapi")["info"]["description"].split())

    def test_routes(self) -> None:
        """Every route and method of the code is in openapi.yaml, and nothing else is."""
        described = {
            (path, method)
            for path, operations in document("openapi")["paths"].items()
            for method in operations
            if method in ("get", "post", "put", "patch", "delete", "options")
        }
        routes = make_routes(cast(Context, None)).wildcard_router.rules
        samples = [path for path, _ in described]
        real = set()
        for rule in routes:
            regex = rule.matcher.regex
            paths = {path for path in samples if regex.fullmatch(path.replace("{channel}", "a/b"))}
            if regex.pattern == ".*$":
                continue  # What is nowhere.
            assert paths, f"{regex.pattern} is not described"
            for method in ("get", "post", "put", "patch", "delete", "options"):
                own = getattr(rule.target, method)
                if own is not getattr(RequestHandler, method):
                    real |= {(path, method) for path in paths}
        assert described == real
        for path, _ in described:
            assert f"`GET {path}`" in re.sub(r"NAME", "{channel}", PROTOCOL) or path in PROTOCOL, path


class TestCommands:
    TEXT = (ROOT / "docs/COMMANDS.md").read_text()

    @staticmethod
    def parsers() -> dict[str, argparse.ArgumentParser]:
        actions = build_parser()._actions
        (commands,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        return dict(commands.choices)

    def test_every_command_has_a_section(self) -> None:
        sections = re.findall(r"^## `tornado-bcast ([\w-]+)`$", self.TEXT, re.MULTILINE)
        assert sections == list(self.parsers())

    def test_every_flag_is_in_its_section(self) -> None:
        for name, parser in self.parsers().items():
            section = self.TEXT.partition(f"## `tornado-bcast {name}`\n")[2].partition("\n## ")[0]
            shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section))
            for action in parser._actions:
                if not isinstance(action, argparse._HelpAction):
                    assert not action.option_strings or shown & set(action.option_strings), action
                    if action.metavar and not action.option_strings:
                        assert str(action.metavar) in section, action
            flags = {flag for action in parser._actions for flag in action.option_strings}
            assert shown <= flags, name


class TestPages:
    @pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
    def test_links_lead_somewhere(self, path: Path) -> None:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            page = (path.parent / name).resolve() if name else path
            assert page.exists(), target
            if anchor:
                assert anchor in set(anchors(page.read_text())), target

    @pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
    def test_make_targets_exist(self, path: Path) -> None:
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        code = "\n".join(re.findall(r"`[^`\n]+`|^    .*$", path.read_text(), re.MULTILINE))
        assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= targets

    @pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
    def test_lines_are_not_endless(self, path: Path) -> None:
        for line in path.read_text().splitlines():
            assert len(line) <= 120 or line.startswith(("|", "    ", "[")), line

    def test_tests_that_are_named_exist(self) -> None:
        """SECURITY.md says of each defence which test shows it."""
        named = re.findall(r"`(tests/test_\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
        assert len(named) > 30
        for file, name in named:
            assert re.search(rf"^\s*(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name

    def test_dependencies_have_their_why(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = chain(project["dependencies"], *project["optional-dependencies"].values())
        names = {re.split(r"[^\w-]", one)[0] for one in needed}
        page = (ROOT / "docs/DEPENDENCIES.md").read_text()
        assert not [name for name in names if f"`{name}`" not in page]


class TestLock:
    """requirements.lock, which the image and CI install."""

    PINS: ClassVar[dict[str, str]] = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )

    def test_it_has_every_dependency_within_its_bounds(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for requirement in map(Requirement, project["dependencies"]):
            pin = self.PINS[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), (
                f"{requirement}: make the lock anew (docs/DEPENDENCIES.md)"
            )

    def test_the_tests_run_with_it(self) -> None:
        """But for what this Python or this machine does not need."""
        installed = {canonicalize_name(one.name): one.version for one in distributions()}
        assert {name: installed.get(name, pin) for name, pin in self.PINS.items()} == self.PINS

    def test_the_dockerfile_uses_it(self) -> None:
        text = (ROOT / "Dockerfile").read_text()
        assert "--require-hashes --only-binary :all: -r requirements.lock" in text
        assert "!requirements.lock" in (ROOT / ".dockerignore").read_text().splitlines()


def anchors(text: str) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# The log


def is_logger(node: ast.expr) -> bool:
    """`logger`, `self._logger` or `logging.getLogger(...)`."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", "") == "getLogger"
    return str(getattr(node, "id", getattr(node, "attr", ""))).endswith("logger")


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    levels = ("debug", "info", "warning", "error", "exception", "critical", "log")
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in levels and is_logger(node.func.value):
                    yield f"{name}:{node.lineno}", node


def test_every_log_line_has_its_event() -> None:
    assert len(list(log_calls())) > 30
    for place, call in log_calls():
        (extra,) = [keyword.value for keyword in call.keywords if keyword.arg == "extra"] or [None]
        if isinstance(extra, ast.Call):
            # `self._extra("slow_consumer")`
            assert isinstance(extra.args[0], ast.Constant), place
            continue
        assert isinstance(extra, ast.Dict), f"{place}: a log line without an event"
        assert "event" in [getattr(key, "value", None) for key in extra.keys], place


def events() -> set[str]:
    found: set[str] = set()
    for _, call in log_calls():
        for keyword in call.keywords:
            if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
                pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
                found |= {
                    str(getattr(value, "value", ""))
                    for key, value in pairs
                    if getattr(key, "value", None) == "event"
                }
            elif keyword.arg == "extra" and isinstance(keyword.value, ast.Call):
                found.add(str(getattr(keyword.value.args[0], "value", "")))
    return found - {""}


def test_events_are_described() -> None:
    """An operator finds each in the table of docs/TROUBLESHOOTING.md, and nothing that is never said."""
    table = (ROOT / "docs/TROUBLESHOOTING.md").read_text().partition("## What the log says")[2]
    rows = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)[1:]
    names = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert names == events() | {"log_failed"}


# What is shipped


def test_a_build_has_every_file(tmp_path: Path) -> None:
    """What `pip install .` puts into the wheel: each file of the package, page and scripts as well."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built")],
        cwd=source,
        check=True,
        capture_output=True,
    )
    built = {
        path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*") if path.is_file()
    }
    wanted = {
        path.relative_to(ROOT)
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert {path for path in built if path.suffix != ".so"} == wanted
    names = {path.name for path in wanted}
    assert {"page.html", "py.typed", "publish.lua", "read.lua"} <= names
