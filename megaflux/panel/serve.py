"""The page's server on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
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


def serve(page: Any, port: int, out: Path, look: dict[str, Any]) -> None:
    """Serve the page until Ctrl-C or SIGTERM. UserError where the port is taken.

    out: the folder whose files the page may show. look: launch options of Gradio for the page's look.
    """
    try:
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
