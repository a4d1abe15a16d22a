"""`python -m megaflux.evaluate --checkpoint RUN --data D --out DIR`: what a run or an export does on held-out pictures.

    torchrun --nproc-per-node 2 -m megaflux.evaluate ...       the ranks share the samples; the figures are the same

options     the command line
samples     held-out samples, and the grid of contents and styles
conditions  what each sample is conditioned by: its own, another's, nothing
making      pictures of conditions; loss: losses by t
work        batches, and the files of their results
judge       the networks that say what a picture shows; hands: who drew it; ink: what they see; judge_training, hands_training, augment
figures     pictures -> figures of each sample; statistics: their means and intervals; results: the report's sections
report      report.json, report.html (html, plots), sheets, TensorBoard
command     from a command line to a report
"""

from __future__ import annotations

from megaflux.common.errors import exit_on_user_error, quiet_interrupt

if __name__ == "__main__":
    quiet_interrupt()

    def main() -> int:
        """The command's exit code."""
        from megaflux.evaluate.options import parse

        request = parse()  # bad input is answered before torch is imported
        from megaflux.evaluate.command import run

        return run(request)

    exit_on_user_error(main)
