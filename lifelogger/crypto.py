"""Encryption of tokens at rest: Fernet (AES-128-CBC with HMAC-SHA-256) with several keys.

The first key encrypts, every key decrypts, so a key is replaced by putting the new one in front,
running `lifelogger keys rotate`, and dropping the old one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from lifelogger.errors import SettingsError
from lifelogger.settings import Settings


class Vault:
    """Encrypts and decrypts tokens. Its repr, like every error it raises, shows neither keys nor tokens."""

    def __init__(self, keys: list[str]) -> None:
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
        except (ValueError, TypeError):
            raise SettingsError(
                "security.encryption_keys: each key is 32 bytes in URL-safe base64 (44 characters); "
                "`lifelogger keys new` prints one"
            ) from None

    @classmethod
    def of(cls, settings: Settings) -> Vault:
        """The vault of the settings' keys, or of the key file in `var/`, made on first use."""
        keys = [key.get_secret_value() for key in settings.security.encryption_keys]
        return cls(keys or [key_file(settings.var / "encryption.key")])

    def encrypt(self, token: str) -> bytes:
        return self._fernet.encrypt(token.encode())

    def decrypt(self, sealed: bytes) -> str:
        """Raises `SettingsError` when none of the keys fits."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            raise SettingsError(
                "security.encryption_keys: a stored token was encrypted with a key that is not among them"
            ) from None

    def rotate(self, sealed: bytes) -> bytes:
        """The same token, encrypted with the first key."""
        try:
            return self._fernet.rotate(sealed)
        except InvalidToken:
            raise SettingsError(
                "security.encryption_keys: a stored token was encrypted with a key that is not among them"
            ) from None


def key_file(path: Path) -> str:
    """The key in `path`; made by whichever process comes first."""
    return made_once(path, Fernet.generate_key)[0]


def made_once(path: Path, make: Callable[[], bytes]) -> tuple[str, bool]:
    """The secret in the file `path`, and whether it was made just now.

    Made by whichever process comes first, readable by its owner only.
    """
    made = False
    if not path.exists():
        # A draft for each thread: writing to one that is linked already would change a key in use.
        handle, draft = tempfile.mkstemp(
            prefix=f"{path.name}.", dir=path.parent
        )  # readable by its owner only
        with os.fdopen(handle, "wb") as file:
            file.write(make())
            file.flush()
            os.fsync(handle)  # a power cut must not leave an empty key behind that was used already
        try:
            os.link(draft, path)  # atomic, and never replaces a key that somebody else just made
            made = True
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
    return path.read_text().strip(), made
