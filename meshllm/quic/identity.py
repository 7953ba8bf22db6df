"""A node's name is its public key: an Ed25519 key pair kept on disk, and the certificate derived from it.

A peer that shows a certificate in a TLS 1.3 handshake proves that it holds the key in it (RFC 8446 section 4.4.3:
CertificateVerify signs the transcript). Nothing else in the certificate counts: no name, no date, no issuer.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from meshllm.errors import IdentityError

_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw
_VALID_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_VALID_TO = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Identity:
    """`node_id` is the public key, 64 hexadecimal digits."""

    key: Ed25519PrivateKey
    certificate: x509.Certificate
    node_id: str


def make_identity(key: Ed25519PrivateKey | None = None) -> Identity:
    """Of this key, or of a new one that lives as long as the process."""
    key = key or Ed25519PrivateKey.generate()
    node_id = key.public_key().public_bytes(*_RAW).hex()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh-llm")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, _VALID_FROM, _VALID_TO)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    return Identity(key, certificate, node_id)


def node_id_of(certificate: x509.Certificate | None) -> str | None:
    """The node that a peer's certificate names, or None when it is of another kind."""
    if certificate is None:
        return None
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key.public_bytes(*_RAW).hex() if isinstance(key, Ed25519PublicKey) else None


class IdentityFile:
    """The key on disk, locked for as long as this process runs: two nodes may not have one name.

    PEM (PKCS 8, no passphrase), mode 0600.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def load(self) -> Identity | None:
        """None when another process of this machine uses it. Made when it is not there. Raises IdentityError."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise IdentityError(f"cannot open the key file {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            return None
        try:
            return self._read_or_make()
        except BaseException:
            self.close()
            raise

    def _read_or_make(self) -> Identity:
        if os.fstat(self._fd).st_mode & 0o077:
            raise IdentityError(f"other users can read the key file {self._path}; run: chmod 600 {self._path}")
        content = os.read(self._fd, 65536)
        if not content:
            key = Ed25519PrivateKey.generate()
            os.write(self._fd, _pem(key))
            os.fsync(self._fd)
            return make_identity(key)
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            loaded = serialization.load_pem_private_key(content, None)
            if isinstance(loaded, Ed25519PrivateKey):
                return make_identity(loaded)
        raise IdentityError(f"{self._path} is not an Ed25519 key; give another file with --identity, or remove it")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def random_hex(n_bytes: int) -> str:
    """A new name for something: twice as many digits."""
    return os.urandom(n_bytes).hex()
