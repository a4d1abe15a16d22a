"""Whether the ranks can meet at MASTER_ADDR and MASTER_PORT: asked before torch, which says it in a traceback, or after hours.

torch's env:// rendezvous: rank 0 listens at MASTER_PORT on all of its addresses, and every rank, 0 too, connects to
MASTER_ADDR. Under torchrun its agent listens in the place of rank 0 (TORCHELASTIC_USE_AGENT_STORE).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator

from megaflux.errors import UserError

RESOLVING = 20.0  # s for a name that a cluster may only just be making known
ARRIVING = 600.0  # s for rank 0, on a machine that may start later
OWN = 5.0  # s for rank 0 to reach its own port
ANOTHER_PORT = "give another: deepspeed --master_port N, torchrun --master_port N, or MASTER_PORT in the environment"
ANOTHER_ADDRESS = (
    "give one of rank 0's machine: deepspeed --master_addr, torchrun --master_addr, or MASTER_ADDR in the environment"
)


def check() -> None:
    """UserError, in one line, where this rank cannot meet the others as the environment says (RANK, MASTER_ADDR,
    MASTER_PORT): a port in use, a name that nobody knows, an address that is not reached.

    Rank 0 takes the port for a moment. Others return when somebody listens there."""
    address, port = os.environ["MASTER_ADDR"], _port()
    _resolve(address, port)
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with _listening(port) as server:
            problem = _reach_oneself(server, address, port)
        if problem:
            raise UserError(f"MASTER_ADDR {address}: rank 0 does not reach its own port {port} there ({problem}); "
                            f"{ANOTHER_ADDRESS}", own=True)  # fmt: skip
    elif problem := _connect(address, port):
        raise UserError(f"MASTER_ADDR {address}: rank {os.environ['RANK']} found nobody at port {port} in {ARRIVING:.0f} s "
                        f"({problem}); {ANOTHER_ADDRESS}, and see that no firewall is between", own=True)  # fmt: skip


def in_words(error: Exception) -> UserError:
    """torch's error of a rendezvous that failed after `check` as one line."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    line = str(error).partition("\n")[0]
    if "EADDRINUSE" in str(error) or "in use" in line:
        return _taken(int(port))
    return UserError(f"MASTER_ADDR {address}, MASTER_PORT {port}: the ranks did not meet there ({line[:200]}); "
                     f"{ANOTHER_ADDRESS}", own=True)  # fmt: skip


def _taken(port: int) -> UserError:
    return UserError(f"MASTER_PORT {port} is in use by another process of this machine; {ANOTHER_PORT}", own=True)


def _port() -> int:
    text = os.environ["MASTER_PORT"]
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT {text}: must be 1 to 65535; {ANOTHER_PORT}", own=True)
    return int(text)


def _resolve(address: str, port: int) -> None:
    until = time.monotonic() + RESOLVING
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:  # a name that IDNA cannot write
            if time.monotonic() > until:
                why = getattr(error, "strerror", None) or error
                raise UserError(f"MASTER_ADDR {address}: {why}; {ANOTHER_ADDRESS}", own=True) from None
        time.sleep(0.5)


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """The port held as torch holds it: on all addresses, IPv6 and 4 at once where there is IPv6."""
    try:
        server = _server(port)
    except PermissionError:
        raise UserError(f"MASTER_PORT {port} is for the system's own; {ANOTHER_PORT}", own=True) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(port) from None
        raise UserError(f"MASTER_PORT {port}: {error.strerror}; {ANOTHER_PORT}", own=True) from None
    with server:
        yield server


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    return socket.create_server(("", port))


def _reach_oneself(server: socket.socket, address: str, port: int) -> str | None:
    """None where what is sent to the address arrives at this very server; else why not. Another machine, or a proxy, may
    accept as well."""
    word, until = secrets.token_bytes(16), time.monotonic() + OWN
    try:
        client = socket.create_connection((address, port), timeout=OWN)
    except OSError as error:
        return error.strerror or str(error)
    with client:
        client.sendall(word)
        while (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller, _ = server.accept()
            except OSError:
                break
            with caller, contextlib.suppress(OSError):  # other ranks call too, and say nothing
                caller.settimeout(1.0)
                if caller.recv(len(word), socket.MSG_WAITALL) == word:
                    return None
    return "another machine answers"


def _connect(address: str, port: int) -> str | None:
    """None once somebody accepts, within ARRIVING; else why nobody did."""
    until = time.monotonic() + ARRIVING
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return None
        except OSError as error:
            if time.monotonic() > until:
                return error.strerror or str(error)
        time.sleep(0.2)
