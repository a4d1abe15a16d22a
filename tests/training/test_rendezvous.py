"""Ranks that cannot meet: one line that names the port or the address and the option, code 2, and nobody hangs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from megaflux.common.errors import STUCK, UserError
from megaflux.training.survival import rendezvous
from tests import forked
from tests.training.runs import LAUNCH, environment, free_port


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def as_rank(monkeypatch, rank: int, address: str, port: object, **more: str) -> None:
    described = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    for name, value in (described | more).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("launcher", ["deepspeed", "environment", "srun"])
def test_a_port_in_use_is_one_line(taken, tmp_path, launcher):
    numbered = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
    how = {
        "deepspeed": (["deepspeed", "--num_accelerators", "2", "--master_port", str(taken)], {}),
        "environment": ([], {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **numbered}),
        "srun": ([], {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", **numbered}),
    }
    command, env = how[launcher]
    training = [LAUNCH, "--run.dir", str(tmp_path / "run")]
    if command:
        done = subprocess.run(
            [*command, *training], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    else:
        done = forked.run(training, environment() | env, 120, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    ours = [line for line in done.stderr.splitlines() if not line.startswith("[2")]  # DeepSpeed dates its own
    assert len(ours) == 1, done.stderr
    assert ours[0].startswith(f"error: MASTER_PORT {taken} is in use") and "deepspeed --master_port N" in ours[0]
    assert not (tmp_path / "run").exists()


def test_a_free_port_stays_free_and_the_others_wait_for_it(monkeypatch):
    port = free_port()
    as_rank(monkeypatch, 0, "localhost", port)
    other = threading.Thread(target=rendezvous._connect, args=("localhost", port), daemon=True)
    other.start()
    other.join(0.5)
    assert other.is_alive()
    rendezvous.check()
    rendezvous.check()  # connections that are only just closed are no hindrance
    with socket.create_server(("", port)):
        other.join(5)
        assert not other.is_alive()
        as_rank(monkeypatch, 0, "localhost", port, TORCHELASTIC_USE_AGENT_STORE="True")  # torchrun's agent has it
        rendezvous.check()


@pytest.mark.parametrize(
    ("address", "port", "said"),
    [
        ("no-such-host.invalid", 29500, "MASTER_ADDR no-such-host.invalid: "),
        ("192.0.2.1", None, "MASTER_ADDR 192.0.2.1: rank 0 does not reach its own port"),  # TEST-NET-1
        ("127.0.0.1", "29500x", "MASTER_PORT 29500x: must be 1 to 65535"),
        ("127.0.0.1", 70000, "MASTER_PORT 70000: must be 1 to 65535"),
    ],
)
def test_an_address_that_is_wrong_is_one_line(monkeypatch, address, port, said):
    monkeypatch.setattr(rendezvous, "RESOLVING", 0.0)
    monkeypatch.setattr(rendezvous, "OWN", 1.0)
    as_rank(monkeypatch, 0, address, port or free_port())
    with pytest.raises(UserError) as found:
        rendezvous.check()
    assert str(found.value).startswith(said) and found.value.own
    assert "--master_port" in str(found.value) or "--master_addr" in str(found.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "rank 1 found nobody at port .*Connection refused.*firewall"),
        ("no-such-host.invalid", "MASTER_ADDR no-such-host.invalid: "),  # its machine has not come up yet
    ],
)
def test_a_first_rank_that_never_comes_is_one_line_and_no_bad_input(monkeypatch, caplog, address, said):
    """A supervisor on this machine must go on trying: the other one may be on its way up."""
    monkeypatch.setattr(rendezvous, "RESOLVING", 0.1)
    monkeypatch.setattr(rendezvous, "ARRIVING", 1.5)
    as_rank(monkeypatch, 1, address, free_port(), LOCAL_RANK="0")
    with pytest.raises(UserError, match=said) as found:
        rendezvous.check()
    assert found.value.code == STUCK
    assert len(caplog.messages) == 1 and "waiting for rank 0" in caplog.messages[0]


FAILS = """
from megaflux.common.errors import STUCK, UserError, exit_on_user_error
def main(): raise UserError("nobody there", own={own}, code=STUCK)
exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    ("rank", "local", "own", "said"),
    [
        (0, 0, False, "error: nobody there\n"),
        (8, 0, True, "error: rank 8: nobody there\n"),  # another machine's first: rank 0 may never learn of it
        (9, 1, True, ""),
        (8, 0, False, ""),
    ],
)
def test_each_machines_first_rank_speaks_of_what_others_may_not_see(rank, local, own, said):
    env = environment() | {"RANK": str(rank), "LOCAL_RANK": str(local)}
    done = subprocess.run([sys.executable, "-c", FAILS.format(own=own)], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (STUCK, said)


@pytest.mark.parametrize("name", rendezvous.DESCRIBED)
def test_half_a_description_is_one_line(monkeypatch, name):
    as_rank(monkeypatch, 0, "127.0.0.1", free_port())
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^{name}: not in the environment") as found:
        rendezvous.check()
    assert found.value.code == 2


def test_what_torch_says_is_one_line(monkeypatch, taken):
    """Two runs that take one port at the same moment: the check saw it free."""
    import torch.distributed as dist

    as_rank(monkeypatch, 0, "127.0.0.1", taken)
    with pytest.raises(dist.DistNetworkError) as error:
        dist.TCPStore("127.0.0.1", taken, 2, is_master=True)
    assert str(rendezvous.in_words(error.value)).startswith(f"MASTER_PORT {taken} is in use")
    assert os.environ["MASTER_PORT"] == str(taken)
