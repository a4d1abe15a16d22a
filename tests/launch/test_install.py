"""launch/install.py: uv, handed pip's settings, must make the environment that pip alone would have made."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "launch" / "install.py"
spec = importlib.util.spec_from_file_location("install", INSTALL)
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)

UV = shutil.which("uv", path=str(Path(sys.executable).parent))
needs_uv = pytest.mark.skipif(UV is None, reason="no uv in this environment: pip installed it")


def wheel(folder: Path, name: str, version: str, build: str, requires: tuple[str, ...] = ()) -> None:
    """A package of one module, NAME.py, that says which build it is."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"BUILD = {build!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as out:
        for path, text in (files | {f"{info}/RECORD": record + f"{info}/RECORD,,\n"}).items():
            out.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def index(folder: Path) -> str:
    """Make an index of the wheels in FOLDER/NAME; returns its URL."""
    for package in (path for path in folder.iterdir() if path.is_dir()):
        links = "".join(f'<a href="{file.name}">{file.name}</a>\n' for file in package.glob("*.whl"))
        (package / "index.html").write_text(f"<!DOCTYPE html><html><body>\n{links}</body></html>")
    return folder.as_uri()


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, str]:
    """Variables of a machine as ours: an index with CUDA builds, wheels of CPU builds on the disk, a second index, and a
    constraint."""
    root = tmp_path_factory.mktemp("packages")
    for version in ("2.12.0", "2.13.0", "2.15.0"):
        wheel(root / "first" / "torch", "torch", version, "cuda")
    wheel(root / "first" / "codec", "codec", "1.0", "old")
    wheel(root / "first" / "codec", "codec", "3.0", "beyond the constraint")
    wheel(root / "first" / "painter", "painter", "1.0", "painter", ("torch>=2.10,<2.14", "codec"))
    wheel(root / "second" / "codec", "codec", "2.0", "new")
    wheel(root / "disk", "torch", "2.13.0+cpu", "cpu")
    wheel(root / "same", "torch", "2.13.0", "on the disk")
    (root / "constraints.txt").write_text("codec<3\n")
    return {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": index(root / "first"),
        "PIP_EXTRA_INDEX_URL": index(root / "second"),
        "PIP_FIND_LINKS": str(root / "disk"),
        "PIP_CONSTRAINT": str(root / "constraints.txt"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


SCRIPT = f"""
import sys
sys.path.insert(0, {str(INSTALL.parent)!r})
import install
sys.exit(install.install(["painter"], "torch>=2.10,<2.14"))
"""
BUILDS = "import json, torch, codec; print(json.dumps([torch.BUILD, codec.BUILD]))"


def installed_by(venv: Path, env: dict[str, str], command: list[str]) -> tuple[list[str], str]:
    """([torch's build, codec's build], what was said) of an installation into an environment without them."""
    python = str(venv / "bin" / "python")
    quiet = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torch", "codec", "painter"]
    subprocess.run(quiet, check=True, capture_output=True)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(venv / "home"), "UV_CACHE_DIR": str(venv / "cache")} | env
    done = subprocess.run([python, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    builds = subprocess.run([python, "-c", BUILDS], capture_output=True, text=True, check=True).stdout
    return json.loads(builds), done.stderr


@needs_uv
@pytest.mark.parametrize(
    ("disk", "without", "builds"),
    [
        # The same version of torch lies on the index as a CUDA build, some GB of it.
        ("disk", (), ["cpu", "new"]),
        # The very same version and file name: uv by itself would take the other one.
        ("same", (), ["cuda", "new"]),
        ("disk", ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"), ["cuda", "beyond the constraint"]),
    ],
)
def test_uv_installs_the_builds_that_pip_installs(packages, venv, disk, without, builds):
    link = venv / "bin" / "uv"
    link.unlink(missing_ok=True)
    link.symlink_to(UV)
    links = str(Path(packages["PIP_FIND_LINKS"]).with_name(disk))
    env = {name: value for name, value in (packages | {"PIP_FIND_LINKS": links}).items() if name not in without}
    by_pip, _ = installed_by(venv, env, ["-m", "pip", "install", "--quiet", "painter"])
    by_uv, said = installed_by(venv, env, ["-c", SCRIPT])
    assert by_uv == by_pip == builds
    assert "installing with pip" not in said
    assert list((venv / "lib").rglob("__pycache__/painter*.pyc"))  # compiled: the first start has nothing left to do


def test_pip_installs_all_of_it_where_uv_is_unavailable(packages, venv):
    (venv / "bin" / "uv").unlink(missing_ok=True)
    builds, said = installed_by(venv, packages, ["-c", SCRIPT])
    assert builds == ["cpu", "new"]
    assert "installing with pip, which takes some minutes: pip could not install uv" in said


def test_a_setting_that_uv_does_not_know_is_left_to_pip():
    with pytest.raises(install.CannotUseUv, match="setting platform"):
        install.uv_options({"platform": "any"})


def test_pips_settings_are_those_of_its_files_and_variables(tmp_path, monkeypatch):
    """[install] over [global], variables over both; what is empty counts as none; quiet hides nothing."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        "[global]\nquiet = 1\nindex-url = https://a.example/simple\ncert = ~/ca.pem\nconstraint = c.txt\n"
        "find-links =\n  /one\n  /two\n[install]\nindex-url = https://b.example/simple\n[list]\nformat = json\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_CONSTRAINT", "other.txt")
    monkeypatch.setenv("PIP_INDEX_URL", "")
    found = install.pip_settings()
    assert found["index-url"] == "https://b.example/simple"
    assert found["constraint"] == "other.txt"
    assert found["find-links"].split() == ["/one", "/two"]
    assert found["cert"] == os.path.expanduser("~/ca.pem")


@pytest.mark.parametrize(
    ("bundle", "expected"), [("/ca.pem", {"SSL_CERT_FILE": "/ca.pem"}), (None, {"UV_NATIVE_TLS": "1"})]
)
def test_uv_trusts_what_pip_trusts(monkeypatch, bundle, expected):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    if bundle:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
    assert install.uv_variables({}) == expected


def test_make_installs_what_is_asked_for_once(tmp_path):
    """`make demo` without the tests' packages, nothing twice, and all of it again where setup.py has changed."""
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()

    def installs(target: str) -> list[str]:
        said = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return [line.partition("install.py ")[2] for line in said.splitlines() if "install.py " in line]

    assert (installs("demo"), installs("test")) == (["demo"], ["demo test"])
    (tmp_path / ".venv" / ".installed-demo").touch()
    assert (installs("demo"), installs("test")) == ([], ["demo test"])
    (tmp_path / ".venv" / ".installed").touch()
    assert (installs("demo"), installs("test")) == ([], [])
    os.utime(tmp_path / "setup.py", (2e9, 2e9))
    assert (installs("demo"), installs("test")) == (["demo test"], ["demo test"])


def test_pips_settings_are_handed_to_uv():
    settings = {
        "extra-index-url": "https://a.example/simple\nhttps://b.example/simple",
        "no-index": "false",
        "pre": "1",
        "cert": "/ca.pem",
        "default-timeout": "180.5",
        "disable-pip-version-check": "1",
    }
    options = install.uv_options(settings)
    assert options[1:] == [
        "--extra-index-url",
        "https://a.example/simple",
        "--extra-index-url",
        "https://b.example/simple",
        "--prerelease=allow",
    ]
    assert install.uv_variables(settings) == {"SSL_CERT_FILE": "/ca.pem", "UV_HTTP_TIMEOUT": "180"}


def test_torch_is_the_one_that_setup_py_asks_for():
    assert install.torch_requirement(ROOT / "setup.py").startswith("torch>=")
