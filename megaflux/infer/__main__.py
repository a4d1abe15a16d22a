"""`python -m megaflux.infer --checkpoint RUN --reference IMG --count 4 --seed 7`: from a command to pictures.

options, values   the command line; one option's text -> its value
request           the options given -> a Request: job (what to make), runtime (with which weights), output
replay            --from-image: the request that a PNG holds, and checks that the replay is the same
dry_run           --dry-run: what would be loaded and made, and what is missing
interactive       --interactive: one job for each line
load              runtime -> the loaded pipeline and detectors
make              job -> pictures on the disk; generation/job.py runs it
"""

from __future__ import annotations

from collections.abc import Sequence

from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.generation.outputs import check_out
from megaflux.generation.run import read_inputs
from megaflux.infer.dry_run import report
from megaflux.infer.interactive import interactive
from megaflux.infer.load import load
from megaflux.infer.make import explained_out_of_memory, make
from megaflux.infer.memory import warn_of_memory
from megaflux.infer.options import build_parser
from megaflux.infer.replay import check_same_weights, expected_maps, read_original, seed_to_write
from megaflux.infer.request import to_request


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. Whatever is wrong with it is a UserError before a model is loaded."""
    given = vars(build_parser().parse_args(argv))
    line_by_line, only_report = given.pop("interactive", False), given.pop("dry_run", False)
    original = read_original(given.pop("from_image")) if "from_image" in given else None
    if line_by_line and only_report:
        raise UserError("--interactive with --dry-run: a dry run loads nothing to be kept; give one of them")
    if line_by_line:
        return interactive(given, original)

    request = to_request(given, None if original is None else original.base)
    check_out(str(request.output.folder))
    embedded = None if original is None else original.embedded
    if only_report:
        return report(request.job, request.runtime, embedded)
    job, opened = read_inputs(request.job, embedded)
    warn_of_memory(job, request.runtime)
    with explained_out_of_memory():
        loaded = load(request.runtime)
        if original is None:
            make(loaded, job, opened, request.output)
        else:
            check_same_weights(original, loaded.pipeline.source, given)
            only, maps = seed_to_write(original, given), expected_maps(original, given)
            make(loaded, job, opened, request.output, only, maps)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
