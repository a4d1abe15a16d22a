"""Read every shard of a dataset and hold it against its index: python -m megaflux.data.verify PATH

exit codes: 0 sound; 2 damaged, with every problem named on one line.
"""

from __future__ import annotations

from collections.abc import Sequence

from megaflux.config import Parser
from megaflux.data.merge import describe
from megaflux.data.shards import verify_dataset
from megaflux.errors import exit_on_user_error
from megaflux.paths import path_option


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises UserError for exit code 2."""
    parser = Parser(prog="python -m megaflux.data.verify", description=__doc__.splitlines()[0], allow_abbrev=True)
    parser.add_argument("path", type=path_option, metavar="PATH", help="the dataset's folder")
    print(describe(verify_dataset(parser.parse_args(arguments).path)))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
