"""Tokens and API keys: what is taken, and every way to come in without one that somebody has thought of."""

import base64
import hashlib
import hmac
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tornado_bcast import keys
from tornado_bcast.auth import MAX_TOKEN_LENGTH, Authenticator, make_token
from tornado_bcast.config import AuthConfig, default_config
from tornado_bcast.errors import BadToken, ConfigError
from tornado_bcast.rules import NOBODY, Principal

SECRET = "a-secret-that-is-long-enough-for-HS256-and-more"
OTHER_SECRET = "another-secret-that-is-long-enough-for-HS256-too"
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
PRIVATE: dict[str, Any] = {"RS256": RSA, "ES256": P256, "EdDSA": ED25519}


def pem(key: Any) -> str:
    """The public key of a private one."""
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return str(public.decode())


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    kind: Any = {RSA: RSAAlgorithm, OTHER_RSA: RSAAlgorithm, P256: ECAlgorithm, ED25519: OKPAlgorithm}[key]
    return {**json.loads(kind.to_jwk(key.public_key())), **more}


def key_set(*entries: Any) -> str:
    return json.dumps({"keys": entries})


def config(**auth: str) -> AuthConfig:
    return default_config(auth=auth).auth


def claims(**more: Any) -> dict[str, Any]:
    """Good ones, with some changed; None leaves one out."""
    good = {"sub": "ann", "exp": int(time.time()) + 60, "subscribe": ["news.*"], "publish": ["chat"]}
    return {name: value for name, value in {**good, **more}.items() if value is not None}


def sign(key: Any = SECRET, algorithm: str = "HS256", headers: Any = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key, algorithm, headers)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(header: Any, payload: Any = None, signature: bytes | None = None, key: bytes = b"") -> str:
    """A token made by hand, with a signature that nobody checks for sense; with `key`, an HMAC."""
    parts = [
        one if isinstance(one, bytes) else json.dumps(one).encode()
        for one in (header, claims() if payload is None else payload)
    ]
    text = ".".join(map(b64, parts))
    if signature is None:
        signature = hmac.digest(key, text.encode(), "sha256") if key else b""
    return f"{text}.{b64(signature)}"


def refused(auth: AuthConfig, token: str) -> str:
    with pytest.raises(BadToken) as caught:
        Authenticator(auth).check_token(token)
    message = str(caught.value)
    assert len(message) < 120 and message.isprintable() and message.endswith((".", ")."))
    assert len(token) < 20 or token not in message
    return message


# What is taken


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_secrets(algorithm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        token = sign(algorithm=algorithm)
    who = Authenticator(config(jwt_secret=SECRET)).check_token(token)
    assert who == Principal("ann", ("news.*",), ("chat",), who.expires_at)
    assert who.expires_at is not None and 55 < who.expires_at - time.time() <= 60
    assert who.may_subscribe("news.a") and not who.may_subscribe("news")
    assert who.may_publish("chat") and not who.may_publish("chat2") and not who.may_publish(None)


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_public_keys(algorithm: str) -> None:
    key = PRIVATE[algorithm]
    token = sign(key, algorithm)
    for auth in (
        config(jwt_public_key=pem(key)),
        config(jwt_public_key="".join(map(pem, PRIVATE.values())), jwt_secret=SECRET),
    ):
        assert Authenticator(auth).check_token(token).sub == "ann"
    others = "".join(pem(other) for other in PRIVATE.values() if other is not key)
    refused(config(jwt_public_key=others, jwt_secret=SECRET), token)


def test_several_keys_of_a_kind() -> None:
    auth = config(jwt_secret=f"{SECRET}\n{OTHER_SECRET}", jwt_public_key=pem(RSA) + pem(OTHER_RSA))
    check = Authenticator(auth).check_token
    for key, algorithm in ((SECRET, "HS256"), (OTHER_SECRET, "HS256"), (RSA, "RS256"), (OTHER_RSA, "RS256")):
        assert check(sign(key, algorithm)).sub == "ann"
        # A `kid` that nobody knows harms no key that has none.
        assert check(sign(key, algorithm, {"kid": "any"})).sub == "ann"


def test_a_short_secret_works_in_development_without_a_word() -> None:
    auth = config(jwt_secret="short")
    token = make_token(auth, Principal("ann", (), (), int(time.time()) + 9))
    assert Authenticator(auth).check_token(token).sub == "ann"


def test_the_time_may_differ_by_five_seconds() -> None:
    check = Authenticator(config(jwt_secret=SECRET)).check_token
    assert check(sign(exp=int(time.time()) - 3)).sub == "ann"
    assert check(sign(nbf=int(time.time()) + 3)).sub == "ann"
    assert check(sign(exp=time.time() + 9.5)).sub == "ann"
    # Of `iat` nothing is promised.
    assert check(sign(iat=int(time.time()) + 3000)).sub == "ann"


def test_audience_and_issuer() -> None:
    auth = config(jwt_secret=SECRET, jwt_audience="bcast\nother", jwt_issuer="https://id.example\nme")
    check = Authenticator(auth).check_token
    assert check(sign(aud="bcast", iss="me")).sub == "ann"
    assert check(sign(aud=["x", "other"], iss="https://id.example")).sub == "ann"
    # Where they are not asked for they do not matter.
    assert Authenticator(config(jwt_secret=SECRET)).check_token(sign(aud="x", iss="y")).sub == "ann"


# Attacks

NOW = int(time.time())
PUBLIC = config(jwt_public_key=pem(RSA) + pem(P256) + pem(ED25519))
BOTH = config(jwt_secret=SECRET, jwt_public_key=pem(RSA) + pem(P256), jwt_audience="me", jwt_issuer="site")
HMAC = config(jwt_secret=SECRET)

ATTACKS: list[Any] = [
    ("alg none", HMAC, forge({"alg": "none"})),
    ("alg None", HMAC, forge({"alg": "None"})),
    ("alg nOnE with a signature", HMAC, forge({"alg": "nOnE"}, key=SECRET.encode())),
    ("alg none against public keys", PUBLIC, forge({"alg": "none"})),
    ("no alg", HMAC, forge({"typ": "JWT"}, key=SECRET.encode())),
    ("alg is no string", HMAC, forge({"alg": ["HS256"]}, key=SECRET.encode())),
    ("alg is null", HMAC, forge({"alg": None}, key=SECRET.encode())),
    ("alg of another case", HMAC, forge({"alg": "hs256"}, key=SECRET.encode())),
    ("alg unknown", HMAC, forge({"alg": "HS1"}, key=SECRET.encode())),
    ("the public key as a secret", PUBLIC, forge({"alg": "HS256"}, key=pem(RSA).encode())),
    ("the public key as a secret, stripped", PUBLIC, forge({"alg": "HS256"}, key=pem(RSA).strip().encode())),
    ("the public key as a secret beside one", BOTH, forge({"alg": "HS256"}, key=pem(RSA).encode())),
    ("an empty secret", HMAC, forge({"alg": "HS256"}, signature=hmac.digest(b"", b"", "sha256"))),
    ("no signature", HMAC, forge({"alg": "HS256"})),
    ("ES256 with zeros for r and s", PUBLIC, forge({"alg": "ES256"}, signature=bytes(64))),
    ("RS256 by another", PUBLIC, sign(OTHER_RSA, "RS256")),
    ("RS512, which is not on the list", PUBLIC, sign(RSA, "RS512")),
    ("PS256, which is not on the list", PUBLIC, sign(RSA, "PS256")),
    ("HS256 by another", HMAC, sign(OTHER_SECRET)),
    ("a key of its own in the header", PUBLIC, sign(OTHER_RSA, "RS256", {"jwk": jwk(OTHER_RSA)})),
    ("an address of keys in the header", PUBLIC, sign(OTHER_RSA, "RS256", {"jku": "http://127.0.0.1/"})),
    ("a file as kid", HMAC, forge({"alg": "HS256", "kid": "/dev/null"}, key=b"\n")),
    ("a kid that is no string", HMAC, forge({"alg": "HS256", "kid": 1}, key=SECRET.encode())),
    ("an extension that must be understood", HMAC, sign(headers={"crit": ["x"], "x": 1})),
    ("a payload that is not in it", HMAC, sign(headers={"crit": ["b64"], "b64": False})),
    ("claims that were changed", HMAC, ".".join((sign().split(".")[0], b64(b'{"sub":"eve"}'), sign()[-43:]))),
    ("another's audience", BOTH, sign(aud="you", iss="site")),
    ("no audience", BOTH, sign(iss="site")),
    ("another's issuer", BOTH, sign(aud="me", iss="elsewhere")),
    ("no issuer", BOTH, sign(aud="me")),
    (
        "an issuer that is a list",
        BOTH,
        forge({"alg": "HS256"}, claims(aud="me", iss=["site"]), key=SECRET.encode()),
    ),
    ("expired", HMAC, sign(exp=NOW - 6)),
    ("expired long ago", HMAC, sign(exp=1)),
    ("no exp", HMAC, sign(exp=None)),
    ("exp is text", HMAC, sign(exp="soon")),
    ("exp is a number as text", HMAC, sign(exp=str(NOW + 99))),
    ("exp is true", HMAC, sign(exp=True)),
    ("exp is infinite", HMAC, forge({"alg": "HS256"}, b'{"sub":"a","exp":Infinity}', key=SECRET.encode())),
    ("exp is no number", HMAC, forge({"alg": "HS256"}, b'{"sub":"a","exp":NaN}', key=SECRET.encode())),
    ("exp is huge", HMAC, sign(exp=10**300)),
    ("exp is null", HMAC, forge({"alg": "HS256"}, {**claims(), "exp": None}, key=SECRET.encode())),
    ("not yet valid", HMAC, sign(nbf=NOW + 600)),
    ("nbf is text", HMAC, sign(nbf="x")),
    ("no sub", HMAC, sign(sub=None)),
    ("an empty sub", HMAC, sign(sub="")),
    ("sub is a number", HMAC, forge({"alg": "HS256"}, claims(sub=7), key=SECRET.encode())),
    ("sub with a line break", HMAC, sign(sub="a\nb")),
    ("a long sub", HMAC, sign(sub="a" * 256)),
    ("subscribe is text", HMAC, sign(subscribe="*")),
    ("subscribe is an object", HMAC, sign(subscribe={"*": 1})),
    ("a glob that is no string", HMAC, sign(subscribe=[1])),
    ("a glob of the server's own", HMAC, sign(publish=["$*"])),
    ("a glob that is empty", HMAC, sign(publish=[""])),
    ("a glob with a line break", HMAC, sign(publish=["a\n"])),
    ("huge", HMAC, sign(x="x" * MAX_TOKEN_LENGTH)),
    ("nested", HMAC, forge({"alg": "HS256"}, b'{"x":' + b"[" * 5000, key=SECRET.encode())),
    ("a nested header", HMAC, forge(b"[" * 5000, key=SECRET.encode())),
    ("claims are an array", HMAC, forge({"alg": "HS256"}, [claims()], key=SECRET.encode())),
    ("claims are no JSON", HMAC, forge({"alg": "HS256"}, b"x", key=SECRET.encode())),
    ("claims are no UTF-8", HMAC, forge({"alg": "HS256"}, b'{"sub":"\xff"}', key=SECRET.encode())),
    ("a header that is an array", HMAC, forge(["HS256"], key=SECRET.encode())),
    ("nothing", HMAC, ""),
    ("dots", HMAC, ".."),
    ("garbage", HMAC, "x.y.z"),
    ("not ASCII", HMAC, "ä.ö.ü"),
    ("half of a surrogate pair", HMAC, "\ud800.a.b"),
    ("zero bytes", HMAC, "\0" * 10),
    ("an API key", HMAC, "bk_" + "x" * 43),
    ("five parts", HMAC, "a.b.c.d.e"),
    ("no key at all", config(api_keys="0" * 64), sign()),
]


@pytest.mark.parametrize(
    ("auth", "token"), [attack[1:] for attack in ATTACKS], ids=[one[0] for one in ATTACKS]
)
def test_attacks(auth: AuthConfig, token: str) -> None:
    refused(auth, token)


def test_the_attacks_fail_for_their_own_reason() -> None:
    """The same tokens, made right, are taken: so nothing else is wrong with them."""
    for auth, token in (
        (HMAC, forge({"alg": "HS256"}, key=SECRET.encode())),
        (PUBLIC, sign(RSA, "RS256")),
        (BOTH, sign(aud="me", iss="site")),
        (BOTH, forge({"alg": "HS256"}, claims(aud="me", iss="site"), key=SECRET.encode())),
        (HMAC, forge({"alg": "HS256"}, {**claims(), "exp": NOW + 600}, key=SECRET.encode())),
    ):
        assert Authenticator(auth).check_token(token).sub == "ann"
    assert refused(HMAC, sign(exp=NOW - 6)) == "The token has expired."
    assert "nbf" in refused(HMAC, sign(nbf=NOW + 600))
    assert "aud" in refused(BOTH, sign(aud="you", iss="site"))
    assert "iss" in refused(BOTH, sign(aud="me", iss="elsewhere"))
    assert "`exp`" in refused(HMAC, sign(exp=None))


def test_a_secret_that_is_a_public_key_cannot_be_set(tmp_path: Path) -> None:
    """So a public key is never what an HMAC is checked with, however it is written."""
    file = tmp_path / "key.pem"
    file.write_text(pem(RSA))
    jwks = tmp_path / "jwks.json"
    jwks.write_text(key_set(jwk(RSA)))
    for text in (pem(RSA), f"file:{file}", f"file:{jwks}", f"{SECRET}\nfile:{file}", "ssh-rsa AAAA"):
        with pytest.raises(ConfigError, match="jwt_secret"):
            config(jwt_secret=text)


@given(
    text=st.text(max_size=200) | st.lists(st.sampled_from([*sign().split("."), ".", "", "="])).map("".join)
)
def test_no_text_is_a_token(text: str) -> None:
    for auth in (HMAC, PUBLIC):
        with pytest.raises(BadToken):
            Authenticator(auth).check_token(text + "x")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    header=st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk"]), _json),
    payload=st.dictionaries(
        st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "subscribe", "publish"]), _json
    ),
    honest=st.booleans(),
)
def test_nothing_else_is_raised(header: Any, payload: Any, honest: bool) -> None:
    token = forge({**header, "alg": "HS256"} if honest else header, payload, key=SECRET.encode())
    for auth in (HMAC, PUBLIC, BOTH):
        try:
            who = Authenticator(auth).check_token(token)
        except BadToken:
            continue
        assert who.sub == payload["sub"] and payload["exp"] > time.time() - 6


# Key sets


def test_a_kid_chooses_the_key(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(jwk(RSA, kid="one"), jwk(OTHER_RSA, kid="two", use="sig", alg="RS256")))
    auth = config(jwks_file=str(file))
    assert config(jwks_file=f"file:{file}") == auth
    check = Authenticator(auth).check_token
    assert check(sign(RSA, "RS256", {"kid": "one"})).sub == "ann"
    assert check(sign(OTHER_RSA, "RS256", {"kid": "two"})).sub == "ann"
    # Without one each is tried.
    assert check(sign(OTHER_RSA, "RS256")).sub == "ann"
    refused(auth, sign(RSA, "RS256", {"kid": "three"}))
    refused(auth, sign(RSA, "RS256", {"kid": "two"}))
    refused(auth, sign(P256, "ES256", {"kid": "one"}))


def test_rotation_of_a_key_set(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    old, new = sign(RSA, "RS256", {"kid": "one"}), sign(P256, "ES256", {"kid": "two"})
    outcomes = []
    for entries in (
        [jwk(RSA, kid="one")],
        [jwk(RSA, kid="one"), jwk(P256, kid="two")],
        [jwk(P256, kid="two")],
    ):
        file.write_text(key_set(*entries))
        outcome = []
        for token in (old, new):
            try:
                Authenticator(config(jwks_file=str(file))).check_token(token)
                outcome.append(True)
            except BadToken:
                outcome.append(False)
        outcomes.append(outcome)
    assert outcomes == [[True, False], [True, True], [False, True]]


def test_what_is_passed_over_in_a_key_set() -> None:
    others = [
        {"kty": "XYZ"},
        {"kty": ["RSA"]},
        {"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": "X25519", "x": "AA"},
        jwk(RSA, use="enc"),
        jwk(RSA, key_ops=["encrypt"]),
        jwk(RSA, alg="RS512"),
        jwk(RSA, alg="ES256"),
        jwk(P256, alg="HS256"),
    ]
    (key,) = keys.read_key_set(key_set(*others, jwk(ED25519, alg="EdDSA")))
    assert key.algorithms == {"EdDSA"} and key.kid is None
    with pytest.raises(ValueError, match="no key for RS256"):
        keys.read_key_set(key_set(*others))


def test_bad_key_sets() -> None:
    for text, sentence in (
        ("x", "not JSON"),
        ("[" * 5000, "not JSON"),
        ("[]", "no JSON Web Key Set"),
        ('{"keys": {}}', "no JSON Web Key Set"),
        ('{"keys": [1]}', "its key 1 is no JSON object"),
        (key_set(jwk(RSA), {"kty": "oct", "k": b64(SECRET.encode())}), "its key 2 is a secret"),
        (key_set(json.loads(RSAAlgorithm.to_jwk(RSA))), "its key 1 is a private key"),
        (key_set(jwk(RSA, kid=1)), "the `kid` of its key 1"),
        (key_set({"kty": "RSA", "n": "AQAB"}), "its key 1 cannot be read"),
        (key_set({"kty": "OKP", "crv": "Ed25519", "x": "AA"}), "its key 1 cannot be read"),
        (key_set({"kty": "EC", "crv": "P-256", "x": 1, "y": []}), "its key 1 cannot be read"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            keys.read_key_set(text)
        assert SECRET not in str(caught.value)


def test_bad_public_keys() -> None:
    private = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for text, sentence in (
        (private, "this is a private key"),
        ("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----", "this is a certificate"),
        ("-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----", "no public key that can be read"),
        (pem(rsa.generate_private_key(65537, 1024)), "an RSA key needs 2048 bits"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "for none of RS256, ES256"),
        (pem(x25519.X25519PrivateKey.generate()), "for none of RS256, ES256"),
    ):
        with pytest.raises(ValueError, match=sentence):
            keys.read_public_key(text)
        with pytest.raises(ConfigError, match=sentence):
            config(jwt_public_key=text)
    assert keys.read_public_key(pem(ed448.Ed448PrivateKey.generate())).algorithms == {"EdDSA"}


# API keys


def api_keys(*lines: str) -> Authenticator:
    return Authenticator(config(api_keys="\n".join(lines)))


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_what_the_line_of_a_key_says() -> None:
    for options, publish, read, rate in (
        ("", None, True, 0),
        ("name=x", None, True, 0),
        ("rate=2.5", None, True, 2.5),
        ("publish=a.*", ("a.*",), False, 0),
        ("publish=a,b publish=c read=yes rate=7 name=x", ("a", "b", "c"), True, 7),
        ("read=yes", (), True, 0),
        ("read=no", (), False, 0),
    ):
        key = api_keys(f"{hashed('k').upper()} {options}").find_api_key("k")
        assert key is not None
        assert (key.publish, key.read, key.rate) == (publish, read, rate), options


def test_keys_are_found_by_their_hash_alone() -> None:
    authenticator = api_keys(hashed("one"), f"{hashed('two')} name=two", hashed("ä"))
    assert authenticator.has_api_keys
    found = authenticator.find_api_key("two")
    assert found is not None and found.name == "two"
    assert authenticator.find_api_key("one") and authenticator.find_api_key("ä")
    for text in ("", "One", "one ", hashed("one"), "\udcff", "x" * 10_000):
        assert authenticator.find_api_key(text) is None
    assert "digest" not in repr(found)


def test_a_file_of_keys_may_have_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# cron\n{hashed('one')} publish=a\n\n  # both\r\n{hashed('two')}\r\n")
    authenticator = api_keys(f"file:{file}", hashed("three"))
    assert all(authenticator.find_api_key(key) for key in ("one", "two", "three"))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b"x" * ((1 << 20) + 1)])
@pytest.mark.parametrize("key", ["jwt_secret", "jwt_public_key", "jwks_file", "api_keys"])
def test_files_that_hold_no_keys(key: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{key}: .{tmp_path}/x.: "):
        config(**{key: f"file:{tmp_path}/x"})
    with pytest.raises(ConfigError, match="Is a directory"):
        config(**{key: f"file:{tmp_path}"})


# Making tokens


def test_tokens_are_made_so_that_they_are_taken() -> None:
    who = Principal("ann", ("a.*",), ("b",), NOW + 600)
    for auth in (HMAC, BOTH, config(jwt_secret=f"{OTHER_SECRET}\n{SECRET}", jwt_issuer="x\ny")):
        assert Authenticator(auth).check_token(make_token(auth, who)) == who
    for key in PRIVATE.values():
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        auth = config(jwt_public_key=pem(key))
        assert Authenticator(auth).check_token(make_token(auth, who, private)) == who
    locked = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")).decode()
    other = OTHER_RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for auth, principal, text, sentence in (
        (PUBLIC, who, None, "no .auth. jwt_secret to sign with"),
        (PUBLIC, who, other, "the server would not take this token"),
        (PUBLIC, who, locked, "a passphrase"),
        (PUBLIC, who, "x", "no private key to sign with"),
        (HMAC, NOBODY, None, "`sub`|`exp`"),
        (HMAC, Principal("ann", ("ä",), (), NOW + 9), None, "`subscribe`"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_token(auth, principal, text)
