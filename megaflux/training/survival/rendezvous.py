"""Check that the ranks can meet at MASTER_ADDR and MASTER_PORT, before torch, which fails with a traceback or after hours.

In torch's env:// rendezvous rank 0 listens at MASTER_PORT on all of its addresses, and every rank, including 0, connects to
MASTER_ADDR. Under torchrun its agent listens instead of rank 0 (TORCHELASTIC_USE_AGENT_STORE).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator

from megaflux.common.errors import STUCK, UserError

log = logging.getLogger("megaflux")
DESCRIBED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that a launcher sets with RANK
RESOLVING = 20.0  # s for a host name that a cluster may still be publishing; later ranks log that they wait
ARRIVING = 600.0  # s for rank 0, whose machine may start later: some clusters publish its name only then
OWN = 5.0  # s for rank 0 to connect to its own port
ANOTHER_PORT = "give another: deepspeed --master_port N, torchrun --master_port N, or MASTER_PORT in the environment"
ANOTHER_ADDRESS = (
    "give one of rank 0's machine: deepspeed --master_addr, torchrun --master_addr, or MASTER_ADDR in the environment"
)


def check() -> None:
    """Raise UserError if this rank cannot meet the others with the environment's RANK, MASTER_ADDR and MASTER_PORT: a
    missing variable, a port in use, an unknown host name, an unreachable address. Where rank 0 may only be late, the
    error's exit code is STUCK: the same command may succeed later.

    Rank 0 binds the port for a moment. Other ranks return once something listens there."""
    missing = [name for name in DESCRIBED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not in the environment, where RANK says that a launcher started this process; "
            "set it, or start with deepspeed or torchrun, or unset RANK to train alone",
            own=True,
        )
    address, port = os.environ["MASTER_ADDR"], _port()
    _resolve(address, port)
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with _listening(port) as server:
            problem = _reach_oneself(server, address, port)
        if problem:
            raise UserError(
                f"MASTER_ADDR {address}: rank 0 does not reach its own port {port} there ({problem}); "
                f"{ANOTHER_ADDRESS}",
                own=True,
            )
    elif problem := _connect(address, port):
        raise UserError(
            f"MASTER_ADDR {address}: rank {os.environ['RANK']} found nobody at port {port} in {ARRIVING:.0f} s "
            f"({problem}); {ANOTHER_ADDRESS}, and see that no firewall is between",
            own=True,
            code=STUCK,
        )


def in_words(error: Exception) -> UserError:
    """A one-line error for torch's, of a rendezvous that failed after `check` passed."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    line = str(error).partition("\n")[0]
    if "EADDRINUSE" in str(error) or "in use" in line:
        return _taken(int(port))
    return UserError(
        f"MASTER_ADDR {address}, MASTER_PORT {port}: the ranks did not meet there ({line[:200]}); {ANOTHER_ADDRESS}",
        own=True,
        code=STUCK,
    )


def _taken(port: int) -> UserError:
    return UserError(f"MASTER_PORT {port} is in use by another process of this machine; {ANOTHER_PORT}", own=True)


def _port() -> int:
    text = os.environ["MASTER_PORT"]
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT {text}: must be 1 to 65535; {ANOTHER_PORT}", own=True)
    return int(text)


def _resolve(address: str, port: int) -> None:
    first, waiting = os.environ["RANK"] == "0", _Waiting(address, port)
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:  # a name that IDNA cannot write
            why = getattr(error, "strerror", None) or error
            if waiting.lasted(RESOLVING if first else ARRIVING, why):
                raise UserError(
                    f"MASTER_ADDR {address}: {why}; {ANOTHER_ADDRESS}", own=True, code=2 if first else STUCK
                ) from None
        time.sleep(0.5)


class _Waiting:
    """How long a rank has waited for rank 0; each machine's first rank logs it once, after RESOLVING."""

    def __init__(self, address: str, port: int):
        self.where, self.began, self.logged = f"{address}:{port}", time.monotonic(), False

    def lasted(self, limit: float, why: object) -> bool:
        """Whether it has waited for longer than `limit` seconds. why: the last error."""
        seconds = time.monotonic() - self.began
        if limit >= seconds > RESOLVING and not self.logged and os.environ.get("LOCAL_RANK") == "0":
            self.logged = True
            log.warning(
                "rank %s: waiting for rank 0 at %s (MASTER_ADDR, MASTER_PORT), up to %.0f s: %s",
                os.environ["RANK"],
                self.where,
                limit,
                why,
            )
        return seconds > limit


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """Bind the port as torch does: on all addresses, IPv4 and IPv6 where the machine has IPv6."""
    try:
        server = _server(port)
    except PermissionError:
        raise UserError(f"MASTER_PORT {port} is reserved for the system; {ANOTHER_PORT}", own=True) from None
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
    """None if what is sent to the address arrives at this server; else the reason. Accepting the connection proves nothing:
    another machine, or a proxy, may do so."""
    token, until = secrets.token_bytes(16), time.monotonic() + OWN
    try:
        client = socket.create_connection((address, port), timeout=OWN)
    except OSError as error:
        return error.strerror or str(error)
    with client:
        client.sendall(token)
        while (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller, _ = server.accept()
            except OSError:
                break
            with caller, contextlib.suppress(OSError):  # other ranks connect too, and send nothing
                caller.settimeout(1.0)
                if caller.recv(len(token), socket.MSG_WAITALL) == token:
                    return None
    return "another machine answers"


def _connect(address: str, port: int) -> str | None:
    """None once a connection is accepted; the last error if none is within ARRIVING."""
    waiting = _Waiting(address, port)
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return None
        except OSError as error:
            why = error.strerror or str(error)
            if waiting.lasted(ARRIVING, why):
                return why
        time.sleep(0.2)
