"""A local page: drop a picture, click dots, generate. `python -m megaflux.panel --checkpoint RUN`, then open the address.

    serve      the server: port, Gradio's settings, Ctrl-C
    wiring     the page: which handler each component calls
    handlers   what a component's event does: an act of state or work, and what the page then shows
    view       the components and where they are
    work       heat-maps and pictures with the loaded pipeline; request, files: the job that the page asks for, its pictures
    state      what a user has on the page, and how each act changes it

Each knows only those below it. Gradio is imported in wiring, handlers and view alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.generation.outputs import check_out
from megaflux.infer.options import add_checkpoint_options, add_device_options, add_network_options
from megaflux.infer.request import to_runtime
from megaflux.panel.serve import HOST, PORT, check_port, give_gradio_a_folder, quiet_gradio, serve, without_proxies


def build_parser() -> Parser:
    """Options that are not given stay out of the namespace. The runtime's are those of megaflux.infer."""
    parser = Parser(
        prog="python -m megaflux.panel",
        hint="see python -m megaflux.panel --help",
        allow_abbrev=True,
        argument_default=argparse.SUPPRESS,
        description="A page on this machine: drop a picture, click dots on its tokens, generate.",
    )
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--port", type=int, metavar="N", help=f"of the page, on {HOST} only (default {PORT})")
    add(
        "--out",
        type=path_option,
        metavar="DIR",
        help="folder for the pictures and what they were made from (default outputs)",
    )
    add_network_options(add, masks="for masks by a click")
    add_device_options(add, kernels_off="diffusers' own path; no attention maps then")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(argv))
    port, out = given.pop("port", PORT), Path(given.pop("out", "outputs"))
    runtime = to_runtime(given)
    check_out(str(out))
    check_port(port)
    quiet_gradio()
    give_gradio_a_folder()
    with without_proxies():
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(f"panel: needs gradio ({error}); pip install 'megaflux[panel]'") from None
        from megaflux.infer.load import load
        from megaflux.panel.view import launch_options
        from megaflux.panel.wiring import build
        from megaflux.panel.work import Work

    print("panel: loading the model ...", flush=True)
    work = Work(load(runtime), out.absolute())
    with without_proxies():
        page = build(work)
    serve(page, port, out, launch_options())
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
