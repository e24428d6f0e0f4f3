"""Makes JSON Web Tokens and key sets with real keys, straight from RFC 7515 to 7518, and forges them as attackers do.

Owns no code of the library that the gateway verifies with, so that both are not wrong together.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import urlsafe_b64encode
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

_HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def packed(document: Any) -> str:
    return b64(json.dumps(document).encode())


def _number(value: int, size: int = 0) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


@cache
def _rsa(bits: int, name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


class Signer:
    """A key of a provider: `RSA`, `P-256`, `P-384`, `P-521`. RSA keys of one name are made once, for they take long."""

    def __init__(
        self, kid: str | None, kind: str = "RSA", bits: int = 2048, alg: str | None = None, name: str = ""
    ) -> None:
        self.kid = kid
        self.kind = kind
        self.alg = alg
        self.key: Any = (
            _rsa(bits, name or str(kid)) if kind == "RSA" else ec.generate_private_key(_CURVES[kind])
        )

    def jwk(self, **changed: Any) -> dict[str, Any]:
        """The public key as a JWK."""
        numbers = self.key.public_key().public_numbers()
        if self.kind == "RSA":
            document = {"kty": "RSA", "n": _number(numbers.n), "e": _number(numbers.e)}
        else:
            size = (self.key.curve.key_size + 7) // 8
            document = {
                "kty": "EC",
                "crv": self.kind,
                "x": _number(numbers.x, size),
                "y": _number(numbers.y, size),
            }
        if self.kid is not None:
            document["kid"] = self.kid
        if self.alg is not None:
            document["alg"] = self.alg
        return {**document, "use": "sig", **changed}

    def public_pem(self) -> bytes:
        return bytes(
            self.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def sign(self, text: bytes, algorithm: str) -> bytes:
        digest = _HASHES[algorithm[2:]]
        if self.kind == "RSA":
            return bytes(self.key.sign(text, padding.PKCS1v15(), digest))
        r, s = decode_dss_signature(self.key.sign(text, ec.ECDSA(digest)))
        size = (self.key.curve.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    def token(self, claims: dict[str, Any], algorithm: str | None = None, **header: Any) -> str:
        """A signed token; `header` members replace or join the usual ones (None: left out)."""
        own = {"RSA": "RS256", "P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}[self.kind]
        algorithm = algorithm or self.alg or own
        fields = {"alg": algorithm, "typ": "JWT", "kid": self.kid, **header}
        head = packed({name: value for name, value in fields.items() if value is not None})
        text = f"{head}.{packed(claims)}"
        return f"{text}.{b64(self.sign(text.encode(), algorithm))}"


def none_token(claims: dict[str, Any], kid: str, algorithm: str = "none", signature: str = "") -> str:
    """A token without a signature."""
    return f"{packed({'alg': algorithm, 'kid': kid})}.{packed(claims)}.{signature}"


def confused_token(claims: dict[str, Any], signer: Signer, secret: bytes | None = None) -> str:
    """A token signed by HMAC with the public key as the secret."""
    text = f"{packed({'alg': 'HS256', 'kid': signer.kid})}.{packed(claims)}"
    return f"{text}.{b64(hmac.digest(secret or signer.public_pem(), text.encode(), hashlib.sha256))}"
