"""Install megaflux into the environment of this Python: python launch/install.py [EXTRA ...]

uv does it in a fraction of pip's time. It reads neither pip.conf nor PIP_* variables, so it is handed pip's settings; and
pip itself installs torch first, whose build (CPU, or CUDA of some version) is then fixed, so that the environment is the
one that pip alone would have made. Without uv, or with a setting of pip's that uv has no option for, pip installs everything.
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
FLAGS = {"no-index": "--no-index", "pre": "--prerelease=allow"}
PATHS = ("cert", "client-cert", "find-links")  # in which pip expands ~
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
    "format",
    "log",
    "no-cache-dir",
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
        command = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-config",
            "--python",
            sys.executable,
            "--compile-bytecode",
            *options,
        ]
        if not run([*command, "--constraint", str(fixed), *requirements], variables):
            return 0
    print("uv failed; installing with pip, which takes some minutes", file=sys.stderr, flush=True)
    return run([sys.executable, "-m", "pip", "install", "--quiet", *requirements])


class CannotUseUv(Exception):
    """Why pip has to install everything."""


def pip_settings() -> dict[str, str]:
    """pip's settings for `pip install`, of all its files and variables: {"find-links": "/opt/wheels", ...}."""
    # With quiet set anywhere it would list nothing.
    env = os.environ | {"PIP_QUIET": "0", "PIP_VERBOSE": "0"}
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, env=env)
    if shown.returncode:
        raise CannotUseUv("`pip config list` failed")
    by_section: dict[str, dict[str, str]] = {}
    for line in shown.stdout.splitlines():
        name, found, value = line.partition("=")
        section, _, key = name.rpartition(".")
        try:
            text = str(ast.literal_eval(value)) if found else ""
        except (ValueError, SyntaxError):
            raise CannotUseUv(f"`pip config list` says {line!r}") from None
        if text.strip():  # an empty value counts as none
            by_section.setdefault(section, {})[key] = os.path.expanduser(text) if key in PATHS else text
    merged: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # later ones override
        merged |= by_section.get(section, {})
    return merged


def uv_options(settings: Mapping[str, str]) -> list[str]:
    """uv's options for pip's settings. Raises CannotUseUv for a setting that has none."""
    return ["--index-strategy=unsafe-best-match", *_options(settings)]  # pip's own: the best version of all indexes


def _options(settings: Mapping[str, str]) -> Iterator[str]:
    for key, value in settings.items():
        if key in OPTIONS:
            for part in value.split():
                yield from (OPTIONS[key], part)
        elif key in FLAGS:
            if value.strip().lower() in ("1", "y", "yes", "t", "true", "on"):
                yield FLAGS[key]
        elif key not in VARIABLES and key not in NEUTRAL:
            raise CannotUseUv(f"uv has no option for pip's setting {key}")


def uv_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that tell uv the rest of pip's settings. Without a certificate of pip's own, uv trusts what pip
    trusts: the bundle of REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, or the system's store."""
    found = {name: settings[key] for key, names in VARIABLES.items() if key in settings for name in names}
    if "UV_HTTP_TIMEOUT" in found:
        found["UV_HTTP_TIMEOUT"] = found["UV_HTTP_TIMEOUT"].partition(".")[0]  # whole seconds
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if "SSL_CERT_FILE" not in found:
        found |= {"SSL_CERT_FILE": bundle} if bundle else {"UV_NATIVE_TLS": "1"}
    return found


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
    """The exit code of a command; 127 where it cannot be started. Variables of uv's own that choose packages are left out."""
    inherited = {
        n: v for n, v in os.environ.items() if not n.startswith("UV_") or n.startswith(("UV_CACHE", "UV_HTTP"))
    }
    try:
        return subprocess.run(command, env=inherited | dict(variables or {})).returncode
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
