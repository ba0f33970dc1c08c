"""Multiaddresses in their binary form, as identify and its kin carry them (multiformats/multiaddr).

A binary address is a row of parts, each a protocol's code (unsigned varint) and a value whose length the code
fixes or a varint gives. A code that we do not know has a value of unknown length, so such an address can not be
read at all: it belongs to a transport that this node does not have.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

import base58

from protocol.errors import Fault, ProtocolError
from protocol.limits import MAX_ADDRESS_CHARS

#: Codes of the multiaddr table (multiformats/multicodec).
_IP4: Final = 4
_TCP: Final = 6
_IP6: Final = 41
_UDP: Final = 273
_P2P: Final = 421

#: Parts that stand alone, and parts whose value is text with its length before it.
_BARE: Final = {290: "p2p-circuit", 460: "quic", 461: "quic-v1", 477: "ws", 478: "wss", 280: "webrtc-direct"}
_TEXTS: Final = {53: "dns", 54: "dns4", 55: "dns6", 56: "dnsaddr"}
_BARE_CODES: Final = {name: code for code, name in _BARE.items()}
_TEXT_CODES: Final = {name: code for code, name in _TEXTS.items()}
_PORT: Final = struct.Struct("!H")

#: A relayed address with two peer ids is 100 bytes; more is nothing that a node could dial.
MAX_MULTIADDR_BYTES: Final = 256

#: Codes, and lengths under MAX_MULTIADDR_BYTES, fit two bytes; the table's largest need three.
_MAX_VARINT_BYTES: Final = 4

#: The longest relayed address, with transport, relay, circuit and peer, has seven.
_MAX_PARTS: Final = 12


def encode_multiaddr(text: str) -> bytes:
    """`/ip4/1.2.3.4/tcp/4001/p2p/12D3KooW…` in binary. Raises ValueError on what this node does not speak."""
    fields = text.split("/")
    if fields[0] or len(fields) < 2:
        raise ValueError(f"{text!r} is no multiaddress")
    out = bytearray()
    left = iter(fields[1:])
    for name in left:
        if name in _BARE_CODES:
            out += encode_varint(_BARE_CODES[name])
            continue
        value = next(left, "")
        if name in _TEXT_CODES:
            body = value.encode()
            out += encode_varint(_TEXT_CODES[name]) + encode_varint(len(body)) + body
        elif name == "ip4":
            out += encode_varint(_IP4) + ipaddress.IPv4Address(value).packed
        elif name == "ip6":
            out += encode_varint(_IP6) + ipaddress.IPv6Address(value).packed
        elif name in {"tcp", "udp"}:
            if not value.isascii() or not value.isdigit() or int(value) > 65535:
                raise ValueError(f"{text!r}: {value!r} is no port")
            out += encode_varint(_TCP if name == "tcp" else _UDP) + _PORT.pack(int(value))
        elif name == "p2p":
            body = base58.b58decode(value)
            out += encode_varint(_P2P) + encode_varint(len(body)) + body
        else:
            raise ValueError(f"{text!r}: {name!r} is no part of an address that this node knows")
    return bytes(out)


def decode_multiaddr_untrusted(data: bytes) -> str:
    """The text of a binary address. Raises ProtocolError, also if it is whole but of a kind we do not know."""
    if not 1 <= len(data) <= MAX_MULTIADDR_BYTES:
        raise ProtocolError(Fault.MALFORMED, f"an address of {len(data)} bytes")
    parts: list[str] = []
    at = 0
    while at < len(data):
        if len(parts) >= _MAX_PARTS:
            raise ProtocolError(Fault.MALFORMED, "an address of too many parts")
        code, at = decode_varint_untrusted(data, at)
        part, at = _part_untrusted(code, data, at)
        parts.append(part)
    text = "/" + "/".join(parts)
    if len(text) > MAX_ADDRESS_CHARS:
        raise ProtocolError(Fault.MALFORMED, f"an address of {len(text)} characters")
    return text


def encode_varint(value: int) -> bytes:
    """Unsigned LEB128 (multiformats/unsigned-varint), `value` >= 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint_untrusted(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends. Raises ProtocolError if it is cut off or too long."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(data):
            raise ProtocolError(Fault.MALFORMED, "a number is cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            if not byte and index:
                raise ProtocolError(Fault.MALFORMED, "a number that is not in its shortest form")
            return value, at + index + 1
    raise ProtocolError(Fault.MALFORMED, "a number is too long")


def _part_untrusted(code: int, data: bytes, at: int) -> tuple[str, int]:
    if code in _BARE:
        return _BARE[code], at
    if code == _IP4:
        value, at = _take_untrusted(data, at, 4)
        return f"ip4/{ipaddress.IPv4Address(value)}", at
    if code == _IP6:
        value, at = _take_untrusted(data, at, 16)
        return f"ip6/{ipaddress.IPv6Address(value)}", at
    if code in {_TCP, _UDP}:
        value, at = _take_untrusted(data, at, 2)
        return f"{'tcp' if code == _TCP else 'udp'}/{_PORT.unpack(value)[0]}", at
    if code not in _TEXTS and code != _P2P:
        raise ProtocolError(Fault.UNEXPECTED, f"an address with a part of unknown kind {code}")
    size, at = decode_varint_untrusted(data, at)
    value, at = _take_untrusted(data, at, size)
    if code == _P2P:
        return f"p2p/{base58.b58encode(value).decode('ascii')}", at
    if not value.isascii() or not value or not all(0x21 <= byte < 0x7F and byte != 0x2F for byte in value):
        raise ProtocolError(Fault.MALFORMED, "an address with a forbidden host name")
    return f"{_TEXTS[code]}/{value.decode('ascii')}", at


def _take_untrusted(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise ProtocolError(Fault.MALFORMED, "an address is cut off")
    return data[at : at + size], at + size
