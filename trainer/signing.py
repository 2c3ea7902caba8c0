"""Signatures of passports: an in-toto Statement (v1) in a DSSE envelope, `passport.dsse.json`. Imports no torch.

The statement's subjects are all files of the export with their sha256, its predicate is the passport. Other tools for
DSSE can verify it. The private key is a PEM file without a passphrase, Ed25519 or ECDSA (P-256, P-384, P-521); only its
path is given, in an environment variable, so that no spec, log or image can contain it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from trainer.errors import CheckpointError, LaunchError, SpecError
from trainer.files import atomic_write
from trainer.passport import PASSPORT, Passport

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

VARIABLE = "YAONGI_SIGNING_KEY"  # the path of the private key
ENVELOPE = "passport.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:x-yaongi:passport:v1"
KINDS = "Ed25519 or ECDSA (P-256, P-384, P-521)"
MAKE = "openssl genpkey -algorithm ed25519 -out key.pem"

K = TypeVar("K")


class Signed(NamedTuple):
    """A signature file: its envelope, the statement in it, and the ids of the keys that signed."""

    envelope: Envelope
    statement: dict[str, Any]
    key_ids: list[str]


def signer() -> CryptoSigner | None:
    """The signer with the key that the environment names; None if it names none.

    Raises:
        SpecError: the key cannot be used.
    """
    if not (path := os.environ.get(VARIABLE)):
        return None
    if "\n" in path or "-----BEGIN" in path:  # messages show the path, so they would show the key
        raise SpecError(f"{VARIABLE} holds a key instead of its path; save the key in a file and give the file's path")
    _need_library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    def load(data: bytes) -> CryptoSigner:
        found = CryptoSigner(load_pem_private_key(data, None))
        if found.public_key.keytype not in ("ed25519", "ecdsa"):
            raise ValueError(found.public_key.keytype)
        return found

    return _key(path, f"{VARIABLE}: {path}", f"a private key in PEM without a passphrase, {KINDS} ({MAKE})", load)


def public_key(path: str | Path) -> SSlibKey:
    """The public key in a PEM file.

    Raises:
        SpecError: it cannot be used.
    """
    _need_library()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    def load(data: bytes) -> SSlibKey:
        return SSlibKey.from_crypto(load_pem_public_key(data))

    wanted = "a public key in PEM (openssl pkey -in key.pem -pubout -out public.pem)"
    return _key(path, f"--key: {path}", wanted, load)


def sign(directory: Path, passport: Passport, data: bytes, by: CryptoSigner) -> str:
    """Sign a passport, whose bytes are `data`; returns the id of the key."""
    from securesystemslib.dsse import Envelope

    payload = json.dumps(statement(passport, data), ensure_ascii=False).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    signature = envelope.sign(by)
    atomic_write(directory / ENVELOPE, json.dumps(envelope.to_dict(), indent=1).encode() + b"\n")
    return str(signature.keyid)


def statement(passport: Passport, data: bytes) -> dict[str, Any]:
    """What is signed."""
    digests = {name: entry.sha256 for name, entry in passport.files.items()}
    digests[PASSPORT] = hashlib.sha256(data).hexdigest()
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(digests.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {name: value for name, value in json.loads(data).items() if name != "files"},
    }


def read(directory: Path) -> Signed | None:
    """The signature of an export; None if it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / ENVELOPE
    if not path.exists():
        return None
    _need_library()
    from securesystemslib.dsse import Envelope

    try:
        envelope = Envelope.from_dict(json.loads(path.read_bytes()))
        said = json.loads(envelope.payload)
        if envelope.payload_type != PAYLOAD_TYPE or not isinstance(said, dict) or not envelope.signatures:
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # the library raises many kinds for files that are no envelopes
        raise CheckpointError(f"{path}: not a DSSE envelope with an in-toto statement") from None
    return Signed(envelope, said, list(envelope.signatures))


def is_by(signed: Signed, key: SSlibKey) -> bool:
    """Whether the envelope has a valid signature by a key."""
    from securesystemslib.exceptions import VerificationError

    try:
        signed.envelope.verify([key], 1)
    except VerificationError:
        return False
    return True


def _key(path: str | Path, where: str, wanted: str, load: Callable[[bytes], K]) -> K:
    try:
        return load(Path(path).read_bytes())
    except OSError as error:
        raise SpecError(f"{where}: cannot be read ({error.strerror}); give the path of {wanted}") from None
    except Exception:  # never with the library's message, which could quote the file
        raise SpecError(f"{where}: no key that can be used; give {wanted}") from None


def _need_library() -> None:
    try:
        import cryptography  # noqa: F401
        import securesystemslib  # noqa: F401
    except ImportError:
        raise LaunchError(
            "signatures need securesystemslib, which is not installed; install it: pip install 'yaongi[train]'"
        ) from None
