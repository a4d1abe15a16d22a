"""Read every shard of a dataset and compare it with its index: python -m megaflux.data.verify PATH

exit codes: 0 sound; 2 damaged, with every problem named on one line.
"""

from __future__ import annotations

from collections.abc import Sequence

from megaflux.common.command import Parser
from megaflux.common.errors import exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.data.storage.dataset import describe
from megaflux.data.storage.shards import verify_dataset


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises UserError for exit code 2."""
    parser = Parser(prog="python -m megaflux.data.verify", description=__doc__.splitlines()[0], allow_abbrev=True)
    parser.add_argument("path", type=path_option, metavar="PATH", help="the dataset's folder")
    print(describe(verify_dataset(parser.parse_args(arguments).path)))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
