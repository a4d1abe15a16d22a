"""Wheels for a GPU machine without network: what megaflux needs beyond torch, transformers and the like.

    python launch/gpu_wheels.py [--python 3.12] [--out .whl] [--first] [--limit 50]

Downloads the versions that are installed here (`make install`), for the other machine's Python and Linux on x86-64. DeepSpeed,
which is published as source only, is built here without its extensions. A wheel that is in --out is not fetched again.
--first: only what benches of FLUX need (diffusers); without it, all that a training run on local data needs. The other machine
must have torch, torchvision, triton, transformers, numpy, pillow, psutil, pyyaml, tensorboard, tqdm, requests,
packaging, py-cpuinfo, msgpack, ninja, pyarrow, pytest and xxhash, each with its own requirements.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # megaflux need not be installed

from megaflux.common.command import Parser, count  # noqa: E402
from megaflux.common.errors import UserError, exit_on_user_error  # noqa: E402
from megaflux.common.paths import path_option  # noqa: E402

THERE = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "numpy",
    "pillow",
    "psutil",
    "pyyaml",
    "tensorboard",
    "tqdm",
    "requests",
    "packaging",
    "py-cpuinfo",
    "msgpack",
    "ninja",
    "pyarrow",
    "pytest",
    "xxhash",
)
FIRST = ("diffusers",)
ALL = (*FIRST, "accelerate", "deepspeed", "mosaicml-streaming", "pydantic", "einops")
# streaming imports these for data in the buckets of their services, and matplotlib for a simulator
UNUSED = (
    "boto3",
    "google-cloud-storage",
    "paramiko",
    "oci",
    "azure-storage-blob",
    "azure-storage-file-datalake",
    "azure-identity",
    "matplotlib",
)
FRESH = ("typing-extensions",)  # carried although the machine has it: pydantic needs a recent one
BUILT = ("deepspeed",)  # published as source only
# For glibc 2.28 and older. pip matches each name literally, and zstd's wheel is named 2_14.
PLATFORMS = (*(f"manylinux_2_{n}" for n in range(28, 4, -1)), "manylinux2014", "manylinux2010", "manylinux1")


def main() -> int:
    parser = Parser(
        prog="launch/gpu_wheels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", metavar="3.N", type=_python, help="of that machine (default 3.12)")
    parser.add_argument(
        "--out", type=path_option, default=".whl", metavar="DIR", help="folder for the wheels (default .whl)"
    )
    parser.add_argument("--first", action="store_true", help="only what benches of FLUX need")
    parser.add_argument(
        "--limit", type=count, default=50, metavar="MB", help="largest size of all wheels together (default 50)"
    )
    args = parser.parse_args()
    out = Path(args.out)
    wanted = chosen(FIRST if args.first else ALL, args.python)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder") from None

    missing = []
    for name, version in wanted.items():
        if found(out, name, version, args.python) is None:
            print(f"{name} {version} ...", flush=True)
            why = fetch(name, version, args.python, out)
            if found(out, name, version, args.python) is None:
                missing.append(f"{name}=={version} ({why or 'pip left no wheel that fits'})")
    total = print_table([p for n, v in wanted.items() if (p := found(out, n, v, args.python)) is not None])
    if missing:
        raise UserError(
            f"no wheel for Python {args.python} on Linux x86-64 of {', '.join(missing)}; the others are in {out}"
        )
    fitting = {path.name for w in wanted.items() if (path := found(out, *w, args.python)) is not None}
    if stray := sorted({path.name for path in out.glob("*.whl")} - fitting):
        names = {canonicalize_name(name.split("-")[0]) for name in stray} & set(wanted)
        if names:
            raise UserError(
                f"{out}: {', '.join(sorted(names))} is there in two versions; delete one: {', '.join(stray)}"
            )
        total += sum((out / name).stat().st_size for name in stray)
    if total > args.limit * 1e6:
        raise UserError(
            f"--limit {args.limit}: the wheels in {out} come to {total / 1e6:.1f} MB; raise it"
            + ("" if args.first else ", or take --first")
        )
    print(f"\nthere: python3 -m pip install --no-index --no-deps --target DIR {out}/*.whl && export PYTHONPATH=DIR")
    return 0


def chosen(roots: Iterable[str], python: str) -> dict[str, str]:
    """{name: version installed here} of the packages to carry: roots and what they require for that Python on Linux x86-64,
    without UNUSED, and without THERE and what that requires. UserError where one is not installed here."""
    have = required(THERE, python, strict=False)
    carried = [n for n in required(roots, python, skip=UNUSED) if n not in have or n in FRESH]
    return {name: importlib.metadata.version(name) for name in sorted(carried)}


def required(roots: Iterable[str], python: str, skip: Iterable[str] = (), strict: bool = True) -> set[str]:
    """Names of roots and all that they require, from the METADATA installed here. strict: UserError for a package that is not
    installed."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    waiting, seen = [Requirement(root) for root in roots], set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen or name in skip:
            continue
        seen.add((name, *sorted(wanted.extras)))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if strict:
                raise UserError(f"{name} is not installed here, so its version is not known; make install") from None
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate(environment | {"extra": e}) for e in ("", *wanted.extras)):
                waiting.append(requirement)
    return {name for name, *_ in seen}


def found(out: Path, name: str, version: str, python: str) -> Path | None:
    """The wheel in a folder of this package and version that fits that Python on Linux x86-64; None: there is no such wheel."""
    minor = int(python.split(".")[1])
    for path in sorted(out.glob("*.whl")):
        try:
            its_name, its_version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if its_name == name and its_version.public == version and any(_fits(tag, minor) for tag in tags):
            return path
    return None


def _fits(tag: Tag, minor: int) -> bool:
    if not (tag.platform == "any" or tag.platform.startswith("manylinux") and tag.platform.endswith("x86_64")):
        return False
    if tag.interpreter in ("py3", f"py3{minor}", f"cp3{minor}"):
        return True
    older = re.fullmatch(r"cp3(\d+)", tag.interpreter)
    return tag.abi == "abi3" and older is not None and int(older[1]) <= minor


def fetch(name: str, version: str, python: str, out: Path) -> str:
    """Let pip put the wheel into the folder; returns the last line of its errors, or "" where it succeeded."""
    if name in BUILT:  # with the setuptools and torch of this environment
        done = pip("wheel", "--no-deps", "--no-build-isolation", "--use-pep517", "-w", str(out), f"{name}=={version}")
    else:
        platforms = [word for p in PLATFORMS for word in ("--platform", f"{p}_x86_64")]
        done = pip(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            *platforms,
            "-d",
            str(out),
            f"{name}=={version}",
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    return errors[-1][:200] if done.returncode else ""


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This environment's pip, with its own configuration."""
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # DeepSpeed stays plain Python
    return subprocess.run([sys.executable, "-m", "pip", *arguments], env=environment, capture_output=True, text=True)


def print_table(wheels: list[Path]) -> int:
    """Print files and sizes; returns their bytes together."""
    sizes = {path.name: path.stat().st_size for path in wheels}
    width = max(map(len, sizes), default=0)
    for name, size in sizes.items():
        print(f"{name:<{width}}  {size / 1e6:8.3f} MB")
    print(f"{f'{len(sizes)} wheels':<{width}}  {sum(sizes.values()) / 1e6:8.3f} MB")
    return sum(sizes.values())


def _python(text: str) -> str:
    if not re.fullmatch(r"3\.\d{1,2}", text) or int(text[2:]) < 11:
        raise argparse.ArgumentTypeError(f"want a Python from 3.11 as 3.12, got {text!r}")
    return text


if __name__ == "__main__":
    exit_on_user_error(main)
