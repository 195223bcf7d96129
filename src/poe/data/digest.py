"""Short digests of text: the same in every process and on every machine."""

import hashlib


def digest(text: str, size: int = 8) -> bytes:
    """BLAKE2b of a text in UTF-8, `size` bytes; lone surrogates count as they are."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def short_hash(text: str) -> int:
    """The digest as an integer from 0 to 2**64 - 1."""
    return int.from_bytes(digest(text), "little")
