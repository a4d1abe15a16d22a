"""A local page: drop a picture, click dots, generate. `python -m megaflux.panel --checkpoint RUN`, then open the address.

Read in this order: here (command line, server), panel_state.py (what a person does, as data), panel_work.py (heat-maps
and pictures), panel_view.py (the page), panel_wiring.py (what its inputs call).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megaflux.common.errors import UserError
from megaflux.common.paths import path_option
from megaflux.generation.outputs import check_out
from megaflux.infer.options import add_networks, to_job

HOST, PORT = "127.0.0.1", 7860


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m megaflux.panel --help")


def build_parser() -> argparse.ArgumentParser:
    """Options left out stay out of the namespace. The runtime's have the names and values of megaflux.infer.make's."""
    parser = _Parser(
        prog="python -m megaflux.panel",
        argument_default=argparse.SUPPRESS,
        description="A page on this machine: drop a picture, click dots on its tokens, generate.",
    )
    add = parser.add_argument
    add("--checkpoint", type=path_option, metavar="DIR", help="a run's folder, or an export's")
    add("--update", type=int, metavar="N", help="the run's checkpoint after N updates (default: the newest)")
    add("--port", type=int, metavar="N", help=f"of the page, on {HOST} only (default {PORT})")
    add(
        "--out",
        type=path_option,
        metavar="DIR",
        help="folder for the pictures and what they were made from (default outputs)",
    )
    add_networks(add, masks="for masks by a click")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), help="auto (default): bfloat16 on a GPU, float32 on the CPU"
    )
    add("--kernels", choices=("on", "off"), help="off: diffusers' own path; no attention maps then")
    add(
        "--offload",
        choices=("model", "sequential"),
        help="keep weights in the host's memory: a part, or a layer, at a time on the GPU",
    )
    add("--quantize", choices=("fp8",), help="FLUX's block weights in float8")
    add("--compile", action="store_true", help="torch.compile FLUX's blocks: minutes at the start, then faster")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(argv))
    port, out = given.pop("port", PORT), Path(given.pop("out", "outputs"))
    _, runtime, _ = to_job({"prompt": "any", **given})  # the prompt stands for what the page will ask
    check_out(str(out))
    check_port(port)
    quiet_gradio()
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"panel: needs gradio ({error}); pip install 'megaflux[panel]'") from None
    from megaflux.infer import make as infer
    from megaflux.panel.wiring import build
    from megaflux.panel.work import Work

    print("panel: loading the model ...", flush=True)
    pipeline, detectors, runtime = infer.load(runtime)
    page = build(Work(pipeline, detectors, runtime, out.absolute()))
    serve(page, port, out)
    return 0


def check_port(port: int) -> None:
    """UserError where no page can be served at the port. Asked before the model is loaded."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: use 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a panel just closed is no hindrance
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise UserError(f"port {port} is for the system's own; give --port N above 1023") from None
        except OSError:
            raise UserError(f"port {port} is taken; give --port N") from None


def quiet_gradio() -> None:
    """Gradio asks its makers' servers for nothing: read when gradio is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    warnings.filterwarnings("ignore", module="gradio")  # its own use of what its libraries have renamed
    # it asks its own address whether it is up; a proxy cannot answer that
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))


def serve(page: Any, port: int, out: Path) -> None:
    """Serve the page until Ctrl-C. UserError: the port was taken meanwhile."""
    from megaflux.panel.view import launch_options

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
            **launch_options(),
        )
    except OSError:
        raise UserError(f"port {port} is taken; give --port N") from None
    print(f"panel: http://{HOST}:{port}  (Ctrl-C stops)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("panel: stopped", flush=True)
    finally:
        page.stop_all()
        # Open tabs keep connections. They are not waited for, and not mourned.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.force_exit = True
        page.close(verbose=False)
