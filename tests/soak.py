"""`make soak`: the long proofs, which go on where they were stopped.

kills    a two-rank run is killed (-9) at random moments, five times in a row, and goes on by the same command each time;
         its end must be bit-equal to the run that nobody killed. 200 points.
updates  10,000 updates of one rank with a loading worker; file descriptors, shared memory and resident memory must not
         grow after the first tenth.

Everything is kept in one folder (runs/soak): FOLDER/kills.jsonl holds a line per point, FOLDER/memory.jsonl one per
sample of the long run. Exit codes: 0 all holds, 1 something did not, 2 the folder is of another version of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from megaflux.common.errors import UserError, exit_on_user_error
from tests.training.faults import Reference, end, kill_chain
from tests.training.runs import LAUNCH, ROOT, ds_config, environment, launch, make_dataset, small_config, write_config

CHAIN = 5  # kills of one run before it may end
WITHIN = 1.3  # s of training in which a kill falls; the whole run trains for about 5
WARM_UP = 0.1  # of the updates
GROWTH = 0.02  # of resident memory, from the first tenth after the warm-up to the last


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="where all is kept (default runs/soak)")
    parser.add_argument("--points", type=int, default=200, help="kills (default 200; 0: none)")
    parser.add_argument("--updates", type=int, default=10_000, help="of the long run (default 10000; 0: none)")
    args = parser.parse_args()
    folder = args.folder.resolve()
    begin(folder)
    held = [kills(folder, args.points)] if args.points else []
    held += [updates(folder, args.updates)] if args.updates else []
    return 0 if all(held) else 1


def begin(folder: Path) -> None:
    """Make the folder and its dataset, or check that it was made by this very code."""
    about = folder / "about.json"
    now = {"code": fingerprint()}
    if not about.exists():
        shutil.rmtree(folder / "pictures", ignore_errors=True)  # a first start that was stopped
        folder.mkdir(parents=True, exist_ok=True)
        make_dataset(folder / "pictures")
        about.write_text(json.dumps(now))
    elif json.loads(about.read_text()) != now:
        raise UserError(f"{folder}: was begun with another version of the code; delete it, or give another --folder")


def fingerprint() -> str:
    digest = hashlib.sha256()
    for package in ("megaflux", "kernels", "launch"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def kills(folder: Path, points: int) -> bool:
    """The kill sweep; says what it found."""
    reference = undisturbed(folder)
    ledger = folder / "kills.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    while len(done) < points:
        seed = 1 + max((point["chain"] for point in done), default=-1)
        run = folder / f"chain-{seed:03d}"
        shutil.rmtree(run, ignore_errors=True)
        try:
            found = kill_chain(reference, run, range(CHAIN * seed, CHAIN * (seed + 1)), WITHIN)
        except AssertionError as error:
            print(f"kills: chain {seed} did NOT end as the run that was not killed: {error}; it is in {run}")
            return False
        done += [{"chain": seed} | asdict(kill) for kill in found]
        with ledger.open("a") as file:
            file.writelines(json.dumps(point) + "\n" for point in done[-len(found) :] if found)
        shutil.rmtree(run)
        print(f"kills: {len(done)} of {points} points bit-equal", flush=True)
    redone = [point["reached"] - point["resumed"] for point in done if point["resumed"] is not None]
    gone = [point["seconds"] for point in done]
    print(
        f"kills: {len(done)} points in {len({p['chain'] for p in done})} runs, all bit-equal; "
        f"{sum(p['phase'] == 'start-up' for p in done)} in start-up, {sum(p['in_save'] for p in done)} in a save; "
        f"{sum(p['stale'] for p in done)} left shared memory, which the next start removed; "
        f"updates done again: at most {max(redone)} (a checkpoint is every 2); "
        f"kill to all processes gone: median {statistics.median(gone):.1f} s, at most {max(gone):.1f} s"
    )
    return max(redone) <= 2 and max(gone) < 10


def undisturbed(folder: Path) -> Reference:
    """24 updates on two ranks over a stage boundary."""
    values = small_config(folder / "pictures" / "data", folder / "reference", train__updates=24)
    whole = Reference(
        folder / "reference",
        ds_config(folder),
        write_config(values, folder / "config.yaml"),
        folder / "pictures" / "data",
    )
    done = launch(*whole.started_by, ranks=2)  # goes on, or sees that it is done
    if done.returncode:
        raise UserError(f"{whole.run}: the undisturbed run failed: {done.stderr.strip().splitlines()[-1]}")
    return whole


def updates(folder: Path, count: int) -> bool:
    """The long run; says how its memory went."""
    run, samples = folder / "long", folder / "memory.jsonl"
    values = small_config(
        folder / "pictures" / "data",
        run,
        train__updates=count,
        train__checkpoint_every=200,
        train__keep_checkpoints=2,
        data__num_workers=1,
        validation__every=500,
        validation__panel_every=1000,
        monitor__every=10,
        monitor__grad_norms_every=100,
        train__hang_timeout=300,
    )
    command = [
        sys.executable,
        LAUNCH,
        "--deepspeed",
        str(ds_config(folder)),
        "--config",
        str(write_config(values, folder / "long.yaml")),
    ]
    started = time.monotonic()
    with (folder / "long.log").open("a") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            attempt = {"pid": process.pid}
            while process.poll() is None:
                time.sleep(2)
                if sample := look(process.pid, run):
                    with samples.open("a") as file:
                        file.write(json.dumps(attempt | sample) + "\n")
        finally:
            process.terminate()
            end(process)
    if process.returncode:
        print(f"updates: the run left with exit code {process.returncode}; see {folder / 'long.log'}")
        return False
    lines = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    pids = {line["pid"] for line in lines}
    held, told = True, []
    # One attempt is one process, and each warms up anew; the longest says most.
    longest = max(pids, key=lambda pid: sum(line["pid"] == pid for line in lines)) if pids else None
    of_one = [line for line in lines if line["pid"] == longest]
    first, last = of_one[0]["update"], of_one[-1]["update"]
    warm = [line for line in of_one if line["update"] >= first + WARM_UP * (last - first)]
    tenth = max(1, len(warm) // 10)
    for name, allowed in (("rss_mb", GROWTH), ("descriptors", 0), ("threads", 0), ("shared_memory", 0)):
        before = statistics.median(line[name] for line in warm[:tenth])
        after = statistics.median(line[name] for line in warm[-tenth:])
        held &= after <= before * (1 + allowed)
        told.append(f"{name} {before:.0f} -> {after:.0f}")
    print(
        f"updates: {last - first} in one process ({len(pids)} attempts, {(time.monotonic() - started) / 60:.0f} minutes "
        f"this time), {len(warm)} samples after the warm-up: {', '.join(told)}"
    )
    return held


def look(pid: int, run: Path) -> dict | None:
    """What a run holds now, its workers included; None while it starts or ends."""
    done = last_update(run)
    try:
        rank = psutil.Process(pid)
        family = [rank, *rank.children(recursive=True)]
        return (
            {
                "update": done,
                "rss_mb": sum(p.memory_info().rss for p in family) / 1e6,
                "descriptors": sum(p.num_fds() for p in family),
                "threads": sum(p.num_threads() for p in family),
                "shared_memory": len({line.split()[5] for p in family for line in maps(p) if "/dev/shm/" in line}),
            }
            if done and rank.status() != psutil.STATUS_ZOMBIE
            else None
        )
    except psutil.Error:
        return None


def maps(process: psutil.Process) -> list[str]:
    file = Path(f"/proc/{process.pid}/maps")
    return file.read_text().splitlines() if file.exists() else []


def last_update(run: Path) -> int:
    from megaflux.training.survival.events import NAME, read

    if not (run / NAME).exists():
        return 0
    return max((event["update"] for event in read(run)[-20:] if event["kind"] == "progress"), default=0)


if __name__ == "__main__":
    exit_on_user_error(main)
