"""Install megaflux into the environment of this Python: python launch/install.py [EXTRA ...]

uv does it in a fraction of pip's time. It reads neither pip.conf nor PIP_* variables, so it is handed pip's settings; and
pip itself installs torch first, whose build (CPU, or CUDA of some version) is then fixed, so that the environment is the
one that pip alone would have made. Without uv, or with a setting of pip's that uv has no word for, pip installs everything.
`make` calls this in .venv. Needs nothing but Python and pip.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv>=0.9,<1"

# pip's setting -> uv's option, for each of its values.
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "build-constraint": "--build-constraint",
    "trusted-host": "--allow-insecure-host",
    "no-binary": "--no-binary",
    "only-binary": "--only-binary",
}
FLAGS = {"no-index": "--no-index", "pre": "--prerelease=allow", "no-cache-dir": "--no-cache"}
# pip's setting -> the variables in which uv looks for it.
VARIABLES = {
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
}
# What changes nothing about which files are installed, or where from.
NEUTRAL = {
    "break-system-packages",
    "cache-dir",
    "config-file",
    "disable-pip-version-check",
    "exists-action",
    "log",
    "no-color",
    "no-input",
    "no-warn-script-location",
    "progress-bar",
    "quiet",
    "require-virtualenv",
    "retries",
    "root-user-action",
    "verbose",
}


def main() -> int:
    """Install; returns the exit code of the last installer."""
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    os.chdir(ROOT)
    return install(["-e", f".{extras}"], torch_requirement(ROOT / "setup.py"))


def install(requirements: list[str], torch: str) -> int:
    """Install requirements (words as pip and uv take them) by uv, or by pip where uv cannot; returns the exit code.

    torch: the requirement that decides which torch pip installs before."""
    try:
        settings = pip_settings()
        options, variables = uv_options(settings), uv_variables(settings)
        uv = find_uv()
    except CannotUseUv as reason:
        print(f"installing with pip, which takes some minutes: {reason}", file=sys.stderr, flush=True)
        return run([sys.executable, "-m", "pip", "install", "--quiet", *requirements])
    # Compiled with everything else, by uv.
    if code := run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", torch]):
        return code
    with tempfile.TemporaryDirectory() as folder:
        fixed = Path(folder) / "torch.txt"
        fixed.write_text(f"torch=={installed_torch()}\n")
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--compile-bytecode", *options]
        if not run([*command, "--constraint", str(fixed), *requirements], variables):
            return 0
    print("uv failed; installing with pip, which takes some minutes", file=sys.stderr, flush=True)
    return run([sys.executable, "-m", "pip", "install", "--quiet", *requirements])


class CannotUseUv(Exception):
    """Why pip has to install everything."""


def pip_settings() -> dict[str, str]:
    """pip's settings for `pip install`, of all its files and variables: {"find-links": "/opt/wheels", ...}."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if shown.returncode:
        raise CannotUseUv("`pip config list` failed")
    by_section: dict[str, dict[str, str]] = {}
    for line in shown.stdout.splitlines():
        name, found, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if found:
            by_section.setdefault(section, {})[key] = str(ast.literal_eval(value))
    # Later sections override earlier ones.
    return {
        key: value for section in ("global", "install", ":env:") for key, value in by_section.get(section, {}).items()
    }


def uv_options(settings: Mapping[str, str]) -> list[str]:
    """uv's options for pip's settings. Raises CannotUseUv for a setting that has none."""
    return ["--index-strategy=unsafe-best-match", *_options(settings)]  # pip's own: the best version of all indexes


def _options(settings: Mapping[str, str]) -> Iterator[str]:
    for key, value in settings.items():
        if key in OPTIONS:
            for part in value.split():
                yield from (OPTIONS[key], part)
        elif key in FLAGS:
            if switched_on(key, value):
                yield FLAGS[key]
        elif key not in VARIABLES and key not in NEUTRAL:
            raise CannotUseUv(f"uv has no option for pip's setting {key}")


def uv_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that tell uv the rest of pip's settings."""
    return {name: settings[key] for key, names in VARIABLES.items() if key in settings for name in names}


def switched_on(key: str, value: str) -> bool:
    """What pip makes of a yes or no, with its oddity: no-cache-dir's off means that there is a cache."""
    return value.strip().lower() in ("1", "y", "yes", "t", "true", "on")


def find_uv() -> str:
    """Path of the uv in this Python's environment, installed by pip if it is missing. Raises CannotUseUv."""
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists() and run([sys.executable, "-m", "pip", "install", "--quiet", UV]):
        raise CannotUseUv("pip could not install uv")
    if not uv.exists():
        raise CannotUseUv(f"no uv in {uv.parent}")
    return str(uv)


def torch_requirement(setup: Path) -> str:
    """The constant TORCH of setup.py, which cannot be imported without running it."""
    for node in ast.parse(setup.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TORCH":
            return str(ast.literal_eval(node.value))
    raise ValueError(f"{setup}: no constant TORCH")


def installed_torch() -> str:
    """Version of the torch in this environment, with its build: 2.13.0+cpu."""
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(command: list[str], variables: Mapping[str, str] | None = None) -> int:
    return subprocess.run(command, env=os.environ | dict(variables or {})).returncode


if __name__ == "__main__":
    sys.exit(main())
