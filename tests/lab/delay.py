"""A delay line: carries IP packets between two TUN devices in two network namespaces, each so many ms later.

delay.py /run/netns/A DEVICE /run/netns/B DEVICE MILLISECONDS      (prints "ready" when both devices are there)
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
#: Packets on their way; what comes on top is dropped, as in any router.
_MOST = 20_000


def open_tun(namespace: str, device: str) -> int:
    """A new TUN device in a namespace. The process stays there; an open device does not care."""
    import ctypes

    entrance = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(entrance, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(entrance)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def carry(one: int, other: int, seconds: float) -> None:
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, packet = waiting.popleft()
            try:
                os.write(target, packet)
            except OSError:
                pass  # the device is down: a cut cable
        wait = max(0.0, waiting[0][0] - now) if waiting else None
        for source in select.select([one, other], [], [], wait)[0]:
            while True:
                try:
                    packet = os.read(source, 65536)
                except BlockingIOError:
                    break
                except OSError:
                    time.sleep(0.01)
                    break
                if len(waiting) < _MOST:
                    waiting.append((time.monotonic() + seconds, other if source == one else one, packet))


def main() -> None:
    here, device, there, far, milliseconds = sys.argv[1:]
    one, other = open_tun(here, device), open_tun(there, far)
    print("ready", flush=True)
    carry(one, other, float(milliseconds) / 1000)


if __name__ == "__main__":
    main()
