"""The command `tornado-bcast`: its arguments, its exit codes, and which command does what.

Owns the parser. Everything heavy (Tornado, Redis, the configuration) is imported by the command that needs
it, so that `publish` in a cron job starts fast.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import ConfigError, Unavailable

if TYPE_CHECKING:
    import socket

    from .board import Board
    from .config import Config

# Exit codes, besides 0. 75 is EX_TEMPFAIL of sysexits.h.
REFUSED = 1
USAGE = 2
TRY_AGAIN_LATER = 75
INTERRUPTED = 130

_COMMANDS = ("serve", "check-config", "publish", "tail", "token", "key", "version")
# Options of `serve` that stand above the environment and the file: name, section and key, metavar, help.
_OVERRIDES = (
    ("--bind", ("server", "bind"), "ADDRESS", "address to listen on"),
    ("--port", ("server", "port"), "PORT", "port to listen on"),
    ("--workers", ("server", "workers"), "N", "number of worker processes"),
    ("--redis-url", ("redis", "url"), "URL", "embedded:, memory:, unix://, redis:// or rediss://"),
    ("--env", ("server", "env"), "ENV", "development or production"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    args = build_parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except ConfigError as exc:
        for problem in exc.problems:
            print(problem, file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has gone, as `head` does. Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tornado-bcast",
        description="A WebSocket broadcast server. Without a command it serves.",
        epilog="`tornado-bcast COMMAND --help` tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="run the daemon (the default)",
        description="Run the daemon. The options here stand above the environment, and that above the file.",
        epilog="Signals: TERM and INT stop, a second one at once; HUP reads the configuration again.",
    )
    _add_config(serve)
    for name, (section, key), metavar, text in _OVERRIDES:
        serve.add_argument(name, metavar=metavar, help=f"{text} ([{section}] {key})")
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check-config",
        help="show each effective setting and where it came from",
        description="Show each effective setting and where it came from; secrets are masked.",
        epilog="Exit code: 0, or 2 when the configuration cannot be used; each fault is told on a line.",
    )
    _add_config(check)
    check.set_defaults(run=_check_config)

    publish = commands.add_parser(
        "publish",
        help="publish one message",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Publish one message and print the server's result as a line of JSON. When the server cannot be\n"
            "reached or has no time, try again with the same id until --timeout: never a second message."
        ),
        epilog=(
            "environment: BCAST_URL and BCAST_KEY, for what the options do not give\n"
            "exit code: 0 taken, 1 refused, 75 try again later (with the same --id), 2 wrong arguments"
        ),
    )
    publish.add_argument("channel", metavar="CHANNEL")
    publish.add_argument("data", metavar="DATA", help="a JSON value; - reads it from standard input")
    publish.add_argument(
        "--text",
        action="store_true",
        help="DATA is text, not JSON (of standard input without the last newline)",
    )
    _add_url(publish)
    publish.add_argument("--key-file", metavar="FILE", help="the file that holds the API key")
    publish.add_argument(
        "--id", metavar="ID", help="the message's id: a channel takes an id once (a new UUID)"
    )
    publish.add_argument(
        "--timeout", metavar="TIME", default="30s", help="how long to try, such as 10s or 5m (30s)"
    )
    publish.set_defaults(run=_publish)

    tail = commands.add_parser(
        "tail",
        help="print the messages of channels as they come",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Subscribe to channels and print each message as a line of JSON. A lost connection is made\n"
            "again; on persistent channels nothing is missed meanwhile."
        ),
        epilog=(
            "environment: BCAST_URL, for what --url does not give\n"
            "exit code: 1 refused, 130 interrupted, 2 wrong arguments"
        ),
    )
    tail.add_argument("channels", metavar="CHANNEL", nargs="+")
    _add_url(tail)
    tail.add_argument(
        "--last", metavar="N", type=_count, help="begin with the last N messages (persistent channels)"
    )
    tail.add_argument("--token-file", metavar="FILE", help="the file that holds the JWT")
    tail.set_defaults(run=_tail)

    token = commands.add_parser(
        "token",
        help="make a token (JWT) for a client",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Make a token and print it. It is signed by the first [auth] jwt_secret of the configuration,\n"
            "or by a private key; jwt_audience and jwt_issuer are put in. See docs/AUTHENTICATION.md."
        ),
        epilog="exit code: 2 wrong arguments, or nothing to sign with",
    )
    _add_config(token)
    token.add_argument("--sub", metavar="NAME", required=True, help="whose token it is")
    for what in ("subscribe", "publish"):
        token.add_argument(
            f"--{what}",
            metavar="GLOB",
            action="append",
            default=[],
            help=f"channels to {what} to; may be given more than once",
        )
    token.add_argument("--ttl", metavar="TIME", default="1h", help="how long it is valid (1h)")
    token.add_argument(
        "--key-file", metavar="FILE", help="a private key (PEM) to sign with: RSA, P-256, Ed25519"
    )
    token.set_defaults(run=_token)

    api_key = commands.add_parser(
        "key",
        help="make an API key",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Make an API key. The first line is the key, which is shown this once; the second one is its\n"
            "line for [auth] api_keys, with only a hash of it. Without --publish and --read it may do all."
        ),
    )
    api_key.add_argument("--name", metavar="NAME", help="what the key is for")
    api_key.add_argument(
        "--publish",
        metavar="GLOB",
        action="append",
        default=[],
        help="the channels that it may publish to; may be given more than once",
    )
    api_key.add_argument("--read", action="store_true", help="it may read /stats, /metrics and /channels")
    api_key.add_argument("--rate", metavar="N", help="how many messages a second it may publish")
    api_key.set_defaults(run=_key)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_print_version)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="the INI file (none: defaults and environment)"
    )


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help="the server (http://127.0.0.1:8080)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _version() -> str:
    return f"tornado-bcast {__version__}"


def _print_version(args: argparse.Namespace) -> int:
    print(_version())
    return 0


def _check_config(args: argparse.Namespace) -> int:
    from . import config

    loaded = config.read(args.config)
    print(config.explain(loaded), flush=True)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _publish(args: argparse.Namespace) -> int:
    import json

    from . import client
    from .values import duration

    try:
        timeout = duration(low=0.001).read(args.timeout)
        data = _read_data(args.data, args.text)
        key = client.read_secret(args.key_file) if args.key_file else os.environ.get("BCAST_KEY", "").strip()
    except ValueError as exc:
        return _fail("publish", str(exc), USAGE)
    message_id = args.id or client.new_id()
    try:
        result = client.publish(
            args.channel, data, url=_url(args), key=key or None, message_id=message_id, timeout=timeout
        )
    except client.Rejected as exc:
        return _fail("publish", exc.message, REFUSED)
    except Unavailable as exc:
        return _fail("publish", f"{exc} Try again later with --id {message_id}", TRY_AGAIN_LATER)
    except ValueError:
        return _fail("publish", "DATA has a number that JSON cannot carry.", USAGE)
    print(json.dumps(result), flush=True)
    return 0


def _read_data(argument: str, as_text: bool) -> Any:
    """The value to send; ValueError with a sentence when there is none."""
    import json

    try:
        if argument == "-":
            text = sys.stdin.buffer.read().decode()
        else:
            text = argument
            text.encode()  # An argument that is not UTF-8 holds surrogates.
    except UnicodeError:
        raise ValueError("DATA is not valid UTF-8.") from None
    if as_text:
        return text.removesuffix("\n") if argument == "-" else text
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as exc:
        where = f"{exc.msg}, line {exc.lineno} column {exc.colno}"
        raise ValueError(f"DATA is not JSON ({where}). Add --text to send it as a string.") from None
    except RecursionError:
        raise ValueError("DATA is nested too deeply.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"DATA is not JSON ({name} is none). Add --text to send it as a string.")


def _tail(args: argparse.Namespace) -> int:
    import asyncio

    from . import client, logs
    from .tail import Follower, Tail

    logs.configure("text", "warning")
    try:
        if args.token_file:
            client.read_secret(args.token_file)
        url = client.Endpoint.parse(_url(args)).url("ws", "/ws")
    except (ValueError, client.Rejected) as exc:
        return _fail("tail", str(exc), USAGE)
    tail = Tail(args.channels, args.last)
    follower = Follower(tail, url, args.token_file, out=sys.stdout, say=lambda text: _say("tail", text))
    try:
        asyncio.run(follower.run())
    except client.Rejected as exc:
        return _fail("tail", exc.message, REFUSED)
    return 0


def _token(args: argparse.Namespace) -> int:
    import time
    from pathlib import Path

    from . import auth, config
    from .values import duration

    try:
        expires_at = int(time.time() + duration(low=1).read(args.ttl))
        private_key = Path(args.key_file).read_text() if args.key_file else None
        principal = auth.Principal(args.sub, tuple(args.subscribe), tuple(args.publish), expires_at)
        print(auth.make_token(config.read(args.config).config.auth, principal, private_key), flush=True)
    except OSError as exc:
        return _fail("token", f"{args.key_file} cannot be read: {exc.strerror}", USAGE)
    except ValueError as exc:
        return _fail("token", f"{exc}", USAGE)
    return 0


def _key(args: argparse.Namespace) -> int:
    import secrets

    from . import keys

    key = "bk_" + secrets.token_urlsafe(32)
    options = {"name": args.name, "publish": ",".join(args.publish), "read": "yes" if args.read else ""}
    words = [f"{name}={value}" for name, value in (options | {"rate": args.rate}).items() if value]
    line = " ".join([keys.digest(key).hex(), *words])
    try:
        if any(char.isspace() for word in words for char in word):
            raise ValueError("no option of a key has white space in it")
        keys.read_api_key(line)
    except ValueError as exc:
        return _fail("key", str(exc), USAGE)
    print(key)
    print(line, flush=True)
    _say("key", "the first line is the key: keep it, it is not shown again.")
    _say("key", "the second line goes into [auth] api_keys, or into a file that it names by file:PATH.")
    return 0


def _url(args: argparse.Namespace) -> str:
    from .client import DEFAULT_URL

    return args.url or os.environ.get("BCAST_URL") or DEFAULT_URL


def _fail(command: str, sentence: str, code: int) -> int:
    _say(command, sentence)
    return code


def _say(command: str, sentence: str) -> None:
    print(f"tornado-bcast {command}: {sentence}", file=sys.stderr, flush=True)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from . import config, logs

    given = {place: getattr(args, _dest(name)) for name, place, *_ in _OVERRIDES}
    overrides = {place: text for place, text in given.items() if text is not None}

    def read() -> "Config":
        loaded = config.read(args.config, overrides=overrides)
        log = loaded.config.log
        logs.configure(log.format, log.level)
        for warning in loaded.warnings:
            logging.getLogger(__name__).warning("%s", warning, extra={"event": "configuration"})
        return loaded.config

    loaded = read()
    # Imported before the fork, so that the workers share the pages.
    from . import daemon, worker
    from .application import make_application

    def serve(config: "Config", sockets: "list[socket.socket]", board: "Board", index: int) -> int:
        logs.configure(config.log.format, config.log.level, worker=index)
        return worker.serve(config, sockets, board, index, make_application)

    return daemon.run(loaded, serve=serve, read=read)


def _dest(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


if __name__ == "__main__":
    sys.exit(main())
