"""The page's server on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError

HOST, PORT = "127.0.0.1", 7860


def check_port(port: int) -> None:
    """UserError where no page can be served at the port. Called before the model is loaded."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: use 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a panel that was just closed is no obstacle
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise UserError(f"port {port} is reserved for the system; give --port N above 1023") from None
        except OSError:
            raise UserError(f"port {port} is taken; give --port N") from None


def quiet_gradio() -> None:
    """Keep Gradio from calling its makers' servers. Must be called before gradio is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    warnings.filterwarnings("ignore", module="gradio")  # it uses deprecated names of its libraries
    # Gradio asks its own address whether it is up, which a proxy cannot answer
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))


def give_gradio_a_folder() -> None:
    """Have Gradio keep uploads in a fresh folder of this process, unless the user names one in GRADIO_TEMP_DIR. Must be
    called before gradio is imported.

    Its default, gradio/ under the system's temporary folder, is whoever's started a page on this machine first. UserError
    where no folder can be written."""
    given = os.environ.get("GRADIO_TEMP_DIR")
    try:
        if given:
            Path(given).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=given).close()
            return
        folder = tempfile.mkdtemp(prefix="megaflux-panel-")
    except OSError as error:
        name = f"GRADIO_TEMP_DIR {given}" if given else "TMPDIR"
        raise UserError(
            f"{name}: no file can be written there ({error.strerror}), and uploads need one; set it to another folder"
        ) from None
    os.environ["GRADIO_TEMP_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


@contextmanager
def without_proxies() -> Iterator[None]:
    """No proxy in the environment. While Gradio is imported and started it makes clients for its own address alone, and
    fails where a proxy speaks SOCKS; the hub's downloads, which come before and after, may need the proxy."""
    names = [name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def serve(page: Any, port: int, out: Path, look: dict[str, Any]) -> None:
    """Serve the page until Ctrl-C or SIGTERM. UserError where the port is taken.

    out: the folder whose files the page may show. look: launch options of Gradio for the page's look.
    """
    try:
        with without_proxies():
            page.queue(default_concurrency_limit=1).launch(
                server_name=HOST,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                show_error=True,
                max_file_size="256mb",
                allowed_paths=[str(out.absolute())],
                **look,
            )
    except OSError:
        raise UserError(f"port {port} is taken; give --port N") from None
    print(f"panel: http://{HOST}:{port}  (Ctrl-C stops)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts as Ctrl-C
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("panel: stopped", flush=True)
    finally:
        page.stop_all()
        # Open tabs keep connections: they are not waited for, nor reported.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.force_exit = True
        page.close(verbose=False)
