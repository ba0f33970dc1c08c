"""A link with latency: packets routed into `tun0` come out of it again after so many seconds (argument).

For kernels without netem. Runs in the network namespace of the public net, until its standard input ends.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def main(delay_s: float) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"tun0", IFF_TUN | IFF_NO_PI))
    os.set_blocking(tun, False)
    print("ready", flush=True)
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([tun, 0], [], [], wait_s)
        if 0 in readable:
            return
        while readable:
            try:
                waiting.append((time.monotonic() + delay_s, os.read(tun, 65536)))
            except (BlockingIOError, OSError):  # nothing more, or the interface is not up yet
                break
        while waiting and waiting[0][0] <= time.monotonic():
            os.write(tun, waiting.popleft()[1])


main(float(sys.argv[1]))
