"""Who somebody is: JSON Web Tokens of clients, and API keys of whoever publishes over HTTP.

Owns the check of signatures (by PyJWT) and of claims. What a key is, and which algorithms it may be used
with, is in keys.py; what a principal may do is in rules.py. Never touches sockets; the time is PyJWT's.

    authenticator = Authenticator(config.auth)
    principal = authenticator.check_token(token)      # BadToken, with a sentence that never quotes it
    key = authenticator.find_api_key(text)            # None: there is no such key
"""

import hmac
import math
import warnings
from typing import Any

import jwt

from .errors import BadToken
from .keys import (
    ApiKey,
    JwtKey,
    digest,
    read_api_key,
    read_key_set,
    read_private_key,
    read_public_key,
    read_secret,
)
from .rules import NOBODY, Principal
from .settings import AuthConfig
from .values import is_glob

__all__ = ["LEEWAY", "NOBODY", "Authenticator", "Principal"]

# Seconds by which the clocks of who makes tokens and who checks them may differ.
LEEWAY = 5.0
# A longer token is not looked at: it does not fit into a header of most proxies.
MAX_TOKEN_LENGTH = 8192
_MAX_SUB_LENGTH = 255
# The end of the year 9999, the last that other software knows.
_MAX_TIME = 253402300799


class Authenticator:
    """The keys of [auth]. Immutable: a reload makes another one."""

    def __init__(self, auth: AuthConfig) -> None:
        self._keys: tuple[JwtKey, ...] = (
            *(read_secret(given.text) for given in auth.jwt_secret),
            *(read_public_key(given.text) for given in auth.jwt_public_key),
            *(key for given in auth.jwks_file for key in read_key_set(given.text)),
        )
        self._audience = [given.text for given in auth.jwt_audience]
        self._issuer = [given.text for given in auth.jwt_issuer]
        self._api_keys: tuple[ApiKey, ...] = tuple(read_api_key(given.text) for given in auth.api_keys)
        self._options: Any = {
            # `sub` is looked at below, and `iat` says nothing that the contract asks for.
            "require": ["exp", "sub"],
            "verify_sub": False,
            "verify_iat": False,
            "verify_jti": False,
            "verify_aud": bool(self._audience),
            "verify_iss": bool(self._issuer),
        }

    @property
    def has_api_keys(self) -> bool:
        return bool(self._api_keys)

    def find_api_key(self, text: str) -> ApiKey | None:
        """The key that this is, in a time that does not depend on which one or whether."""
        given, found = digest(text), None
        for key in self._api_keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        return found

    def check_token(self, token: str) -> Principal:
        """Whose token this is. Raises BadToken."""
        if not self._keys:
            raise BadToken("This server checks no tokens: set [auth] jwt_secret or another key of tokens.")
        if len(token) > MAX_TOKEN_LENGTH:
            raise BadToken(f"The token is longer than {MAX_TOKEN_LENGTH} characters.")
        try:
            return _principal(self._claims(token))
        except jwt.ExpiredSignatureError:
            raise BadToken("The token has expired.") from None
        except jwt.ImmatureSignatureError:
            raise BadToken("The token is not valid yet (`nbf`).") from None
        except jwt.InvalidAudienceError:
            raise BadToken("The token is meant for another audience (`aud`).") from None
        except jwt.InvalidIssuerError:
            raise BadToken("The token comes from another issuer (`iss`).") from None
        except jwt.MissingRequiredClaimError as error:
            raise BadToken(f"The token lacks the claim `{error.claim}`.") from None
        # What else PyJWT and the JSON parser raise on bytes that somebody has made up.
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise BadToken("The token cannot be read, or no key of this server has signed it.") from None

    def _claims(self, token: str) -> dict[str, Any]:
        """The claims, with a signature by one of the keys that may have made it."""
        header = jwt.get_unverified_header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        failure: jwt.PyJWTError = jwt.InvalidSignatureError()
        for key in self._keys:
            if algorithm not in key.algorithms or (kid and key.kid and kid != key.kid):
                continue
            try:
                return self._decode(token, key)
            except jwt.InvalidSignatureError as error:
                failure = error
        raise failure

    def _decode(self, token: str, key: JwtKey) -> dict[str, Any]:
        with warnings.catch_warnings():
            # Of short secrets the start has warned.
            warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=sorted(key.algorithms),
                audience=self._audience or None,
                issuer=self._issuer or None,
                leeway=LEEWAY,
                options=self._options,
            )
        return claims


def make_token(auth: AuthConfig, principal: Principal, private_key: str | None = None) -> str:
    """A token that the server of this configuration takes, signed by its first secret, or by a PEM text.

    Raises ValueError with a sentence where it cannot be made, or would not be taken.
    """
    claims: dict[str, Any] = {
        "sub": principal.sub,
        "exp": principal.expires_at,
        "subscribe": list(principal.subscribe),
        "publish": list(principal.publish),
    }
    for name, values in (("aud", auth.jwt_audience), ("iss", auth.jwt_issuer)):
        if values:
            claims[name] = values[0].text
    if private_key is not None:
        key, algorithm = read_private_key(private_key)
    elif auth.jwt_secret:
        key, algorithm = auth.jwt_secret[0].text, "HS256"
    else:
        raise ValueError(
            "there is no [auth] jwt_secret to sign with; set one, or give --key-file PRIVATE.pem"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        token = jwt.encode(claims, key, algorithm)
    try:
        _principal(claims)
        if auth.jwt_secret or auth.jwt_public_key or auth.jwks_file:
            Authenticator(auth).check_token(token)
    except BadToken as error:
        raise ValueError(f"the server would not take this token. {error}") from None
    return token


def _principal(claims: dict[str, Any]) -> Principal:
    sub, end = claims["sub"], claims["exp"]
    if not isinstance(sub, str) or not 0 < len(sub) <= _MAX_SUB_LENGTH or not sub.isprintable():
        raise BadToken(f"The claim `sub` must be a string of 1 to {_MAX_SUB_LENGTH} printable characters.")
    if isinstance(end, bool) or not isinstance(end, (int, float)) or not 0 < end <= _MAX_TIME:
        raise BadToken("The claim `exp` must be a time in seconds.")
    return Principal(sub, _globs(claims, "subscribe"), _globs(claims, "publish"), math.floor(end))


def _globs(claims: dict[str, Any], name: str) -> tuple[str, ...]:
    globs = claims.get(name, [])
    if not isinstance(globs, list) or not all(isinstance(item, str) and is_glob(item) for item in globs):
        raise BadToken(f"The claim `{name}` must be an array of globs of channel names.")
    return tuple(globs)
