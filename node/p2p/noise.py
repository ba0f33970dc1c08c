"""Who is at the other end, and that nobody listens in: libp2p's noise handshake, then our own record layer.

The handshake (Noise XX, signed by the peers' Ed25519 keys) is py-libp2p's. It is the only security protocol
offered, so plaintext can not be negotiated. Once it is done, we take its two ChaCha20-Poly1305 keys and cut
and seal the records ourselves: the library's layer takes several reads, locks and copies for each record,
and a cancelled write in it leaves half a record on the wire.

The untyped surface of py-libp2p lives in this module and nowhere else.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from node.p2p.errors import ChannelBroken
from node.p2p.transport import ExactReader, Transport, send_all
from protocol.ids import PeerId

NOISE_PROTOCOL: Final = "/noise"

_LENGTH: Final = struct.Struct("!H")
_NONCE: Final = struct.Struct("<4xQ")
_TAG_BYTES: Final = 16

#: Plain bytes that one record holds (Noise: 65,535 with the tag).
MAX_RECORD_BYTES: Final = 65_535 - _TAG_BYTES


class HandshakeFailed(Exception):
    """The other side did not prove to be who it should be, or does not speak noise."""


class Channel(Protocol):
    """A secured connection: records of plain bytes, one reader, one writer."""

    @property
    def remote(self) -> str: ...

    def send_nowait(self, data: bytes) -> bool:
        """Take up to MAX_RECORD_BYTES. False: part of it waits; call `flush` before the next.

        Raises ChannelBroken.
        """
        ...

    async def flush(self) -> None:
        """Wait until all that was taken has left. Raises ChannelBroken. Cancelling loses nothing."""
        ...

    async def receive(self) -> list[bytes]:
        """Plain bytes of the records that came, [] at the end. Raises ChannelBroken."""
        ...

    def close(self) -> None: ...


class NoiseChannel:
    """The record layer over a transport."""

    def __init__(self, transport: Transport, send_key: bytes, receive_key: bytes, early: bytes = b"") -> None:
        self._transport = transport
        self._sealer = ChaCha20Poly1305(send_key)
        self._opener = ChaCha20Poly1305(receive_key)
        self._sent = 0
        self._received = 0
        self._unsent = memoryview(b"")
        self._partial = bytearray(early)
        self._early_records: list[bytes] = []

    @property
    def remote(self) -> str:
        return self._transport.remote

    def send_nowait(self, data: bytes) -> bool:
        if self._unsent:
            raise RuntimeError("flush first")
        sealed = self._sealer.encrypt(_NONCE.pack(self._sent), data, None)
        self._sent += 1
        record = _LENGTH.pack(len(sealed)) + sealed
        taken = self._transport.send_nowait(record)
        if taken == len(record):
            return True
        self._unsent = memoryview(record)[taken:]
        return False

    async def flush(self) -> None:
        while self._unsent:
            await self._transport.wait_writable()
            self._unsent = self._unsent[self._transport.send_nowait(self._unsent) :]

    async def receive(self) -> list[bytes]:
        if self._early_records:
            records, self._early_records = self._early_records, []
            return records
        if self._partial and (records := self._open(b"")):  # what the handshake read too much
            return records
        while True:
            chunk = await self._transport.receive_some()
            if not chunk:
                if self._partial:
                    raise ChannelBroken("the connection ended inside a record")
                return []
            records = self._open(chunk)
            if records:
                return records

    def unreceive(self, data: bytes) -> None:
        """Put bytes back that belong to the next reader."""
        if data:
            self._early_records.append(data)

    def _open(self, chunk: bytes) -> list[bytes]:
        if self._partial:
            self._partial += chunk
            data: bytes | bytearray = self._partial
        else:
            data = chunk
        view = memoryview(data)
        at, size = 0, len(data)
        records: list[bytes] = []
        while size - at >= 2:
            end = at + 2 + (view[at] << 8 | view[at + 1])
            if end > size:
                break
            try:
                plain = self._opener.decrypt(_NONCE.pack(self._received), view[at + 2 : end], None)
            except InvalidTag as error:
                raise ChannelBroken("a record that was not sealed with the agreed key") from error
            self._received += 1
            if plain:
                records.append(plain)
            at = end
        if data is chunk:
            self._partial = bytearray(view[at:])
        else:
            view.release()
            del self._partial[:at]
        return records

    def close(self) -> None:
        self._transport.close()


@dataclass(frozen=True, slots=True)
class Secured:
    """A finished handshake."""

    peer: PeerId
    channel: NoiseChannel
    bulk: bool = False
    """The two agreed to keep it for bulk (node/p2p/bulk.py)."""


class Credentials:
    """Our side of every handshake, made from the identity's seed."""

    def __init__(self, seed: bytes) -> None:
        key = Ed25519PrivateKey.new(seed)
        pair = KeyPair(key, key.get_public_key())
        # The static Diffie-Hellman key proves nothing by itself; a fresh one per process is good practice.
        self._transport = NoiseTransport(pair, X25519PrivateKey.new())
        self.peer: Final = PeerId(str(ID.from_pubkey(pair.public_key)))

    async def dial(self, transport: Transport, reader: ExactReader, peer: PeerId) -> Secured:
        """Prove who we are to `peer`, and that it is there. Raises HandshakeFailed or ChannelBroken."""
        raw = _RawConnection(transport, reader, is_initiator=True)
        return await self._finish(raw, self._transport.secure_outbound(raw, ID.from_base58(peer)))

    async def accept(self, transport: Transport, reader: ExactReader) -> Secured:
        """Learn who dialled. Raises HandshakeFailed or ChannelBroken."""
        raw = _RawConnection(transport, reader, is_initiator=False)
        return await self._finish(raw, self._transport.secure_inbound(raw))

    async def _finish(self, raw: _RawConnection, handshake: Awaitable[Any]) -> Secured:
        try:
            session = await handshake
        except ChannelBroken:
            raise
        except Exception as error:
            # The outermost boundary of hostile bytes in code that is not ours: the library raises whatever
            # its parsers and ciphers raise (ValueError, InvalidTag, DecodeError, AssertionError, ...).
            raise HandshakeFailed(f"the noise handshake failed ({type(error).__name__})") from error
        protocol = session.conn.noise_state.noise_protocol
        channel = NoiseChannel(
            raw.transport,
            bytes(protocol.cipher_state_encrypt.k),
            bytes(protocol.cipher_state_decrypt.k),
            bytes(raw.reader.buffer),
        )
        return Secured(PeerId(str(session.get_remote_peer())), channel)


class _RawConnection(IRawConnection):
    """Shows a transport to the library's handshake; each read returns as much as was asked for."""

    def __init__(self, transport: Transport, reader: ExactReader, *, is_initiator: bool) -> None:
        self.transport = transport
        self.reader = reader
        self.is_initiator = is_initiator

    async def read(self, n: int | None = None) -> bytes:
        return await self.reader.read_exactly(n or 0)

    async def write(self, data: bytes) -> None:
        await send_all(self.transport, data)

    async def close(self) -> None:
        self.transport.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Any]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT
