"""Network namespaces without names: a descriptor each, so that nothing stays behind when its holder dies."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from bench.lab.need import LabUnavailable

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFTXQLEN: Final = 0x8943
_IFF_TUN_PACKETS_ONLY: Final = 0x0001 | 0x1000
_IFF_UP_RUNNING: Final = 0x0001 | 0x0040

#: Packets that a device holds while the router is busy: a burst of 64 connections' windows.
_DEVICE_QUEUE: Final = 4096

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """`descriptor` keeps the namespace alive; `tun` is the far end of its only link."""

    descriptor: int
    tun: int


def make_namespaces(addresses: list[str], prefix: int, mtu: int) -> list[Namespace]:
    """One namespace per address, its device and loopback up. Raises LabUnavailable, leaving nothing over."""
    made: list[Namespace] = []

    def make() -> None:
        for address in addresses:
            _check(_libc.unshare(_CLONE_NEWNET), "unshare")
            made.append(_furnish(address, prefix, mtu))

    try:
        in_thread(make)
    except OSError as error:
        for namespace in made:
            os.close(namespace.descriptor)
            os.close(namespace.tun)
        raise LabUnavailable(f"no network namespace could be made: {error}") from error
    return made


def inside(descriptor: int, work: Callable[[], T]) -> T:
    """What `work` returns when it is called within the namespace, in a thread that ends then."""

    def enter() -> T:
        _check(_libc.setns(descriptor, _CLONE_NEWNET), "setns")
        return work()

    return in_thread(enter)


def in_thread(work: Callable[[], T]) -> T:
    """A namespace is a thread's own, so it is changed in one that nobody uses afterwards."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="lab-namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _furnish(address: str, prefix: int, mtu: int) -> Namespace:
    """The namespace that this thread has just entered."""
    # IPv6 would only send its neighbour talk through the router.
    with suppress(OSError):
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    tun = -1
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tun, _TUNSETIFF, _request("lab0", struct.pack("H", _IFF_TUN_PACKETS_ONLY)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            mask = socket.inet_ntoa(struct.pack("!I", 0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF))
            for code, value in (
                (_SIOCSIFADDR, _address(address)),
                (_SIOCSIFNETMASK, _address(mask)),
                (_SIOCSIFMTU, struct.pack("i", mtu)),
                (_SIOCSIFTXQLEN, struct.pack("i", _DEVICE_QUEUE)),
                (_SIOCSIFFLAGS, struct.pack("H", _IFF_UP_RUNNING)),
            ):
                fcntl.ioctl(control, code, _request("lab0", value))
            fcntl.ioctl(control, _SIOCSIFFLAGS, _request("lo", struct.pack("H", _IFF_UP_RUNNING)))
    except BaseException:
        os.close(descriptor)
        if tun >= 0:
            os.close(tun)
        raise
    return Namespace(descriptor, tun)


def _request(device: str, value: bytes) -> bytes:
    """struct ifreq: the device's name and a union of 24 bytes."""
    return struct.pack("16s24s", device.encode(), value)


def _address(text: str) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
