"""Keys as they are written: secrets, PEM, JSON Web Key Sets and lines of `api_keys`, made into what is used.

Owns which algorithms a key may be used with: they follow from the key's own type, never from a token, so that
no text can be taken for another kind of key. Knows no file, no socket and no clock. Every function raises
ValueError with a sentence that never repeats a key.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from jwt import PyJWK, PyJWTError

from .values import is_glob, quote, suggest

Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA"]

SECRET_ALGORITHMS: frozenset[Algorithm] = frozenset(("HS256", "HS384", "HS512"))
# A secret of fewer bytes than SHA-256 gives (RFC 7518, section 3.2) can be guessed from a single token.
MIN_SECRET_BYTES = 32
_MIN_RSA_BITS = 2048
# What docker-compose.yml brings for development, as everybody knows.
KNOWN_KEYS = ("dev-key",)

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.+?-----END [A-Z0-9 ]+-----", re.DOTALL)
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_RATE = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,3})?")
_OPTIONS = ("name", "publish", "read", "rate")


@dataclass(frozen=True, slots=True)
class JwtKey:
    """What tokens are checked with: a secret as bytes, or a public key, and the algorithms of its type."""

    key: Any = field(repr=False)
    algorithms: frozenset[Algorithm]
    # The `kid` of a JSON Web Key; None: it may be the key of any token.
    kid: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A line of `api_keys`. `publish` None: everywhere. `rate` is in messages a second, 0: no limit."""

    digest: bytes = field(repr=False)
    name: str | None = None
    publish: tuple[str, ...] | None = None
    read: bool = True
    rate: float = 0.0


def digest(key: str) -> bytes:
    """What stands in the configuration of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_secret(text: str) -> JwtKey:
    """A secret for HMAC. What looks like another kind of key is none: everybody may know a public key."""
    if "-----BEGIN" in text or "-----END" in text or text.startswith(("ssh-", "ecdsa-sha2-", "sk-ssh-")):
        raise ValueError("a public or private key is no secret; PEM belongs into jwt_public_key")
    if text.startswith("{"):
        raise ValueError("this looks like a JSON Web Key; a key set belongs into jwks_file")
    return JwtKey(text.encode(), SECRET_ALGORITHMS)


def split_pem(text: str) -> list[str]:
    """The blocks of a PEM text, without what stands between them."""
    blocks = _PEM.findall(text)
    if not blocks:
        raise ValueError("there is no PEM text (`-----BEGIN PUBLIC KEY-----`) in it")
    return blocks


def read_public_key(text: str) -> JwtKey:
    """One PEM block of a public key."""
    if "PRIVATE KEY" in text:
        raise ValueError("this is a private key; the server needs the public one, keep this elsewhere")
    if "CERTIFICATE" in text:
        raise ValueError("this is a certificate; take its public key: openssl x509 -pubkey -noout")
    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("the PEM text is no public key that can be read") from None
    return JwtKey(key, _algorithms(key))


def read_private_key(text: str) -> tuple[Any, Algorithm]:
    """The private key of a PEM text, and the algorithm that it signs with. For the command line alone."""
    try:
        key: Any = load_pem_private_key(text.encode(), password=None)
        (algorithm,) = _algorithms(key.public_key())
    except (TypeError, UnsupportedAlgorithm):
        raise ValueError("the private key has a passphrase, or is of an unknown kind") from None
    except ValueError as error:
        raise ValueError(f"the file holds no private key to sign with: {error}") from None
    return key, algorithm


def _algorithms(key: object) -> frozenset[Algorithm]:
    """Those that a public key is for."""
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise ValueError(f"an RSA key needs {_MIN_RSA_BITS} bits, this one has {key.key_size}")
        return frozenset(("RS256",))
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return frozenset(("ES256",))
    if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        return frozenset(("EdDSA",))
    raise ValueError("the key is for none of RS256, ES256 (P-256) and EdDSA")


def read_key_set(text: str) -> list[JwtKey]:
    """The keys of a JSON Web Key Set (RFC 7517). Keys of unknown kinds and uses are passed over."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise ValueError('it is no JSON Web Key Set: `{"keys": [...]}`')
    keys = [key for number, entry in enumerate(entries, 1) for key in _read_key(entry, number)]
    if not keys:
        raise ValueError("it has no key for RS256, ES256 or EdDSA")
    return keys


def _read_key(entry: object, number: int) -> Iterator[JwtKey]:
    if not isinstance(entry, dict):
        raise ValueError(f"its key {number} is no JSON object")
    if entry.get("kty") == "oct":
        raise ValueError(f"its key {number} is a secret; secrets belong into jwt_secret")
    if "d" in entry:
        raise ValueError(f"its key {number} is a private key; the server needs only the public part")
    kid, operations = entry.get("kid"), entry.get("key_ops")
    if kid is not None and not isinstance(kid, str):
        raise ValueError(f"the `kid` of its key {number} is no string")
    if entry.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return
    if entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("alg", "RS256") not in (
        "RS256",
        "ES256",
        "EdDSA",
    ):
        return
    if (entry["kty"], entry.get("crv")) not in (
        ("RSA", None),
        ("EC", "P-256"),
        ("OKP", "Ed25519"),
        ("OKP", "Ed448"),
    ):
        return
    try:
        key = PyJWK({name: value for name, value in entry.items() if name != "alg"}).key
    except (PyJWTError, ValueError, TypeError, KeyError):
        raise ValueError(f"its key {number} cannot be read") from None
    algorithms = _algorithms(key)
    if entry.get("alg", next(iter(algorithms))) in algorithms:
        yield JwtKey(key, algorithms, kid)


def read_api_key(line: str) -> ApiKey:
    """A line of `api_keys`: a sha256 hash and, if wanted, `name= publish= read= rate=`.

    Without `publish` and `read` the key may do everything; with either of them only what they say.
    """
    first, *words = line.split()
    if not _HASH.fullmatch(first):
        raise ValueError(
            "a line begins with the sha256 hash of a key (64 hex digits); `tornado-bcast key` makes both"
        )
    given: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OPTIONS or not equals:
            raise ValueError(f"{quote(name)} is no option of a key{suggest(name, _OPTIONS)}")
        if name in given and name != "publish":
            raise ValueError(f"`{name}` stands twice on a line")
        given.setdefault(name, []).extend(value.split(",") if name == "publish" else [value])
    for pattern in given.get("publish", ()):
        if not is_glob(pattern):
            raise ValueError(f"{quote(pattern)} is no glob of channel names")
    (read,) = given.get("read", ["no" if "publish" in given else "yes"])
    if read not in ("yes", "no"):
        raise ValueError(f"`read` is yes or no, not {quote(read)}")
    (rate,) = given.get("rate", ["0"])
    if not _RATE.fullmatch(rate):
        raise ValueError(f"`rate` is a number of messages a second, not {quote(rate)}")
    (name,) = given.get("name", [""])
    if len(name) > 64 or not name.isprintable():
        raise ValueError("`name` has at most 64 printable characters")
    publish = tuple(given.get("publish", ())) if given.keys() & {"publish", "read"} else None
    return ApiKey(bytes.fromhex(first), name or None, publish, read == "yes", float(rate))
