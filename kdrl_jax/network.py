"""Keeping a process off the network: `offline=True`.

Three layers. The Hugging Face libraries are told by their own variables, so that they read their
caches. An audit hook of Python refuses every connection and name look-up that leaves this machine,
whichever package asks. Child processes inherit both. Not Python's, and so not seen by the hook:
the processes of a run among themselves (gRPC, Gloo, NCCL), which are meant.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

from kdrl_jax.types import UserError

VARIABLE = "KDRL_OFFLINE"
"""Set in the environment of a process that is offline, for its children."""
LIBRARIES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class OfflineError(UserError, OSError):
    """Something asked for the network. An OSError too, so that what can do without it does."""


class _State:
    offline = False
    hooked = False
    before: dict[str, str | None] = {}  # noqa: RUF012 (of this process, as the others)


def set_offline(offline: bool) -> None:
    """Refuse, or allow again, whatever this process and its children ask of the network.

    Loopback and Unix sockets are no network. May be called again at any time.
    """
    if offline == _State.offline:
        return
    if offline:
        _State.before = {name: os.environ.get(name) for name in (*LIBRARIES, VARIABLE)}
        os.environ.update(dict.fromkeys(_State.before, "1"))
        if not _State.hooked:  # hooks cannot be taken out again
            sys.addaudithook(_hook)
            _State.hooked = True
    else:
        for name, value in _State.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    _State.offline = offline
    _tell_loaded_libraries()


def is_loopback(host: Any) -> bool:
    """Whether a host's name or address is this machine itself, without asking anybody."""
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("ascii", "replace")
    if host is None or host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0].strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _tell_loaded_libraries() -> None:
    """These read their variables when they are imported, which may have been before."""
    on = _State.offline or _State.before.get("HF_HUB_OFFLINE") == "1"
    for module, names in (
        ("huggingface_hub.constants", ("HF_HUB_OFFLINE",)),
        ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
    ):
        if found := sys.modules.get(module):
            for name in names:
                if hasattr(found, name):
                    setattr(found, name, on)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _State.offline or not event.startswith("socket."):
        return
    host: Any
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        sock, address = args[0], args[1]
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not address:
            return  # a Unix socket, the kernel; or one that is connected already
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    if not is_loopback(host):
        raise OfflineError(
            f"offline: True, but {event.removeprefix('socket.')} of {host!r} was asked for; put "
            "what is needed on this machine, or set offline=False"
        )


if os.environ.get(VARIABLE) == "1":  # a child of such a process
    set_offline(True)
