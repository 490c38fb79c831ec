"""The alphabet of byte-level vocabularies: every byte as one printable character (GPT-2's mapping)."""

from __future__ import annotations

from collections.abc import Mapping


def _byte_of_character() -> dict[str, int]:
    """Printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()


def bytes_of_token(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for.

    An added token may have characters outside the alphabet; as a whole it then stands for itself.
    """
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
