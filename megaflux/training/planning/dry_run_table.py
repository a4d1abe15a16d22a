"""The dry run's table of micro-batches: the memory and predicted speed of each, on GPUs of known speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megaflux.config.schema import Config, Stage
from megaflux.training.ds_config import divisors
from megaflux.training.planning.gpus import GPUS, Assumed, Gpu
from megaflux.training.planning.memory import USABLE, usable
from megaflux.training.planning.micro_batch import Choice, Planner, best_of
from megaflux.training.planning.sizes import Sizes
from megaflux.training.planning.throughput import LAUNCHES_NOTE, Cluster

GIGA, TERA = 1e9, 1e12
DAY = 86400


@dataclass(frozen=True)
class Line:
    """One micro-batch of a stage on a GPU."""

    gpu: Gpu
    stage: Stage
    updates: int
    """Of the stage."""
    cache: tuple[str, ...]
    """data.cache."""
    choice: Choice
    chosen: bool
    """Whether the run would use this micro-batch."""

    def as_json(self, scope: str, images: int) -> dict[str, Any]:
        """Plain data for the report. scope: "largest", the slowest bucket, or "mean" over all buckets. images: per update."""
        choice = self.choice
        largest = max(choice.seconds, key=lambda bucket: choice.seconds[bucket])
        seconds = choice.seconds[largest] if scope == "largest" else choice.mean_seconds
        flops = choice.flops[largest] if scope == "largest" else sum(choice.flops.values()) / len(choice.flops)
        return {
            "gpu": self.gpu.name,
            "scope": scope,
            "stage": self.stage.name,
            "cache": list(self.cache),
            "micro": choice.micro_batch_size,
            "memory_gb": choice.bytes / GIGA,
            "policies": choice.counts,
            "tflop_per_image": flops / TERA,
            "images_per_s": images / seconds,
            "days": self.updates * seconds / DAY,
            "fits": choice.fits,
            "chosen": self.chosen,
        }


def gpus_of(assumed: Assumed) -> list[Gpu]:
    """The GPUs in the table: the one that the user names, else all known ones, with what the user states about them."""
    gpus = []
    for name in [assumed.name] if assumed.name else GPUS:
        gpu = replace(assumed, name=name).of()
        gpus += [gpu] if gpu is not None else []
    return gpus


def micro_batch_lines(sizes: Sizes, gpus: Sequence[Gpu], choose: bool) -> list[Line]:
    """Every divisor of what a rank draws, for each GPU and stage: with data.cache as configured, and with latents and trunk
    cached if the configuration allows it. The configured micro-batch is the chosen one, unless `choose`."""
    config = sizes.config
    planners = {cache: Planner(sizes.cached(cache)) for cache in _caches(config)}
    micro_batches = divisors(sizes.drawn)
    if not choose and sizes.micro_batch_size not in micro_batches:  # a problem that the checks report
        micro_batches = sorted([*micro_batches, sizes.micro_batch_size])
    found = []
    for gpu in gpus:
        for cache, planner in planners.items():
            for stage, updates in zip(config.stages, config.stage_updates(), strict=True):
                limit, cluster = usable(gpu.memory_gb * GIGA), Cluster(gpu, sizes.ranks)
                choices = planner.choices(stage, micro_batches, limit, cluster)
                best = best_of(choices).micro_batch_size if choose else sizes.micro_batch_size
                found += [Line(gpu, stage, updates, cache, c, c.micro_batch_size == best) for c in choices]
    return found


def _caches(config: Config) -> list[tuple[str, ...]]:
    own, both = config.data.cache, ("latents", "trunk")
    allowed = (
        set(config.data.condition.drawn) <= {"image", "none"} and not config.data.sample_posterior
    )  # as schema.Config requires
    return [own, both] if allowed and set(own) != set(both) else [own]


def print_table(found: Sequence[Line], sizes: Sizes, choose: bool) -> None:
    """Print the lines with data.cache as configured, and of each stage the chosen one with everything cached. If no plan
    recomputes anything and the micro-batch is given, print the chosen lines alone."""
    config, ranks = sizes.config, sizes.ranks
    again = any(line.choice.counts["none"] < len(line.choice.policies) for line in found)
    images = config.train.global_batch_size
    print(
        f"\nMicro-batches that divide the {sizes.drawn} images a rank draws (train.micro_batch_size), on "
        f"{ranks} GPU{'s' * (ranks > 1)}. Predicted, not\nmeasured: TFLOP an image and images/s of the largest bucket, then in "
        "the mean of all; days of the stage's updates;\n* chosen\n"
    )
    print(
        f"{'GPU':<13}{'stage':<11}{'cache':<15}{'micro':>6}{'GB':>8}{'none':>6}{'mlp':>5}{'full':>5}"
        f"{'TFLOP/image':>18}{'images/s':>16}{'days':>8}"
    )
    own = config.data.cache
    for line in found:
        if not line.chosen and (line.cache != own or not (choose or again)):
            continue
        largest, mean = (line.as_json(scope, images) for scope in ("largest", "mean"))
        mark = "*" if line.chosen else " "
        if not line.choice.fits:
            mark += " does not fit" if line.choice.bytes > line.gpu.memory_gb * GIGA else f" over {USABLE:.0%} of it"
        policies = line.choice.counts
        print(
            f"{line.gpu.name:<13}{line.stage.name[:10]:<11}{','.join(line.cache) or '-':<15}{line.choice.micro_batch_size:>6}"
            f"{largest['memory_gb']:>8.1f}{policies['none']:>6}{policies['mlp']:>5}{policies['full']:>5}"
            f"{_short(largest['tflop_per_image']):>10}{_short(mean['tflop_per_image']):>8}{_short(largest['images_per_s']):>8}"
            f"{_short(mean['images_per_s']):>8}{_short(mean['days']):>8} {mark}"
        )
    print()
    for text in assumptions(found, ranks):
        print(f"assumed: {text}")


def _short(value: float) -> str:
    """At least three digits in at most seven characters: "0.0005", "18.5", "1430"."""
    if value < 1e-4:
        return "<0.0001"
    if value < 0.01:
        return f"{value:.4f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def assumptions(found: Sequence[Line], ranks: int) -> list[str]:
    """What the predictions assume, one line each."""
    gpus = dict.fromkeys(line.gpu for line in found)
    return [text for gpu in gpus for text in Cluster(gpu, ranks).assumptions()] + [LAUNCHES_NOTE]
