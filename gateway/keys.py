"""API keys from the configuration, until accounts come.

A key is `ak_` and 256 random bits. Only its SHA-256 is kept; a presented key is hashed and looked up, so
the time that takes tells nothing about the keys there are (a caller can not steer the hash).
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PREFIX: Final = "ak_"

#: Longest key that is hashed; ours have 46 characters.
MAX_KEY_CHARS: Final = 512
#: A key shorter than this could be guessed.
MIN_KEY_CHARS: Final = 16
MAX_KEY_NAME_CHARS: Final = 128

_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
_FIELDS: Final = frozenset({"name", "key", "sha256", "requests_per_minute"})


class KeyConfigError(ValueError):
    """The configuration's keys can not be used. The text says which entry and what to write."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A consumer. `requests_per_minute` None: the gateway's default; 0: no limit."""

    name: str
    sha256: str
    requests_per_minute: int | None = None


def new_key() -> str:
    """A fresh key, shown once to its owner."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of_key(key: str) -> str:
    """64 lower-case hex digits: what the configuration may hold instead of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """Who may call. `open_to_all`: anybody may; known keys are still recognised by name and limit."""

    def __init__(self, keys: Iterable[ApiKey], *, open_to_all: bool = False) -> None:
        self._by_hash: dict[str, ApiKey] = {}
        names: set[str] = set()
        for key in keys:
            if key.name in names:
                raise KeyConfigError(f"two keys are named {key.name!r}")
            if key.sha256 in self._by_hash:
                raise KeyConfigError(f"key {key.name!r} is the same as {self._by_hash[key.sha256].name!r}")
            names.add(key.name)
            self._by_hash[key.sha256] = key
        self.open_to_all: Final = open_to_all
        if not self._by_hash and not open_to_all:
            raise KeyConfigError(
                "no API keys are configured: make one with `archi-gateway key` and put it under "
                "[[keys]] in the configuration, or into ARCHI_API_KEY; --open (open = true) lets anybody in"
            )

    @classmethod
    def from_config(cls, entries: Iterable[Mapping[str, object]], *, open_to_all: bool = False) -> KeyRing:
        """From tables of `name`, `key` or `sha256`, and `requests_per_minute`. Raises KeyConfigError."""
        return cls([_key_from_config(entry, i) for i, entry in enumerate(entries)], open_to_all=open_to_all)

    def identify_untrusted(self, authorization: str | None) -> ApiKey | None:
        """The consumer behind an `Authorization` header, or None if it names none."""
        if authorization is None or len(authorization) > MAX_KEY_CHARS:
            return None
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._by_hash.get(hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest())


def _key_from_config(entry: Mapping[str, object], index: int) -> ApiKey:
    where = f"keys[{index}]"
    unknown = sorted(set(entry) - _FIELDS)
    if unknown:
        raise KeyConfigError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(sorted(_FIELDS))}")
    name, key, sha256 = entry.get("name"), entry.get("key"), entry.get("sha256")
    limit = entry.get("requests_per_minute")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_KEY_NAME_CHARS:
        raise KeyConfigError(f"{where}: name must be text of 1 to {MAX_KEY_NAME_CHARS} characters")
    if (key is None) == (sha256 is None):
        raise KeyConfigError(f"{where} ({name}): give either key or sha256")
    if key is not None:
        if not isinstance(key, str) or not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS - len("Bearer "):
            raise KeyConfigError(f"{where} ({name}): key must be text of at least {MIN_KEY_CHARS} characters")
        sha256 = hash_of_key(key)
    if not isinstance(sha256, str) or not _SHA256.match(sha256):
        raise KeyConfigError(f"{where} ({name}): sha256 must be 64 lower-case hex digits")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise KeyConfigError(f"{where} ({name}): requests_per_minute must be a whole number, 0 for no limit")
    return ApiKey(name, sha256, limit)
