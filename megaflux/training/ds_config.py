"""DeepSpeed's configuration file: sharding, precision and communication. Batch sizes and rates come from the run's own
configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megaflux.common.errors import UserError
from megaflux.common.paths import expanded
from megaflux.config.schema import Config

if TYPE_CHECKING:  # torch takes seconds to import, and the checks of the command line do without it
    import torch

# Key of DeepSpeed's file -> the field of the run's configuration that decides it.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.warmup_fraction and optim.plateau_fraction",
}
# Keys of zero_optimization that are filled in where the file lacks them: (value in a new run, value in a run begun before
# they were filled in, which is DeepSpeed's own default).
FILLED = {
    # Gradients reduced at once, in elements. The largest parameter that dev trains, a weight of Qwen's MLP, has 67.9 M;
    # DeepSpeed's default would take 4 GB during every backward pass.
    "reduce_bucket_size": (70_000_000, 500_000_000),
    # False: each gradient is sent only to the rank that updates its parameter.
    "use_multi_rank_bucket_allreduce": (False, True),
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict.

    Raises UserError for a missing file, invalid JSON, "auto" values (DeepSpeed alone cannot resolve them), fp16 (its loss
    scaling is not supported here), and keys that the run's configuration sets.
    """
    where = f"--deepspeed {path}"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give a file as ds_configs/zero2.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); give a file as ds_configs/zero2.json") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: want an object {{...}}, found a {type(values).__name__}")
    for key in values.keys() & OWNED.keys():
        raise UserError(f"{where}: {key} comes from the run's configuration ({OWNED[key]}): remove it")
    for key, value in _leaves(values):
        if value == "auto":
            raise UserError(f'{where}: {key} is "auto", which nothing resolves: remove it or give a value')
    values = _with_homes(values, where)
    for name in ("fp16", "bf16", "zero_optimization", "timers"):
        if not isinstance(values.get(name, {}), dict):
            raise UserError(f"{where}: {name} must be an object {{...}}")
    if values.get("fp16", {}).get("enabled"):
        raise UserError(f"{where}: fp16 is not supported: use bf16, or neither for float32")
    if zero_stage(values) not in (2, 3):
        raise UserError(f"{where}: zero_optimization.stage must be 2 or 3, got {zero_stage(values)!r}")
    bucket = with_defaults(values)["zero_optimization"]["reduce_bucket_size"]
    if isinstance(bucket, bool) or not isinstance(bucket, int | float) or not 1 <= bucket < float("inf"):
        raise UserError(f"{where}: zero_optimization.reduce_bucket_size must be a number from 1, got {bucket!r}")
    return values


def _with_homes(value: Any, where: str) -> Any:
    """Expand `~` at the beginning of every string (nvme_path, output_path), which DeepSpeed takes literally."""
    if isinstance(value, dict):
        return {key: _with_homes(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_homes(inner, where) for inner in value]
    try:
        return expanded(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def with_defaults(ds_config: dict[str, Any], resumed: dict[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration with FILLED. resumed: the configuration of the run being resumed, whose values replace those
    of FILLED, so that sums over more than two ranks keep their order; None: a new run."""
    zero, before = ds_config.get("zero_optimization", {}), (resumed or {}).get("zero_optimization", {})
    filled = {key: new if resumed is None else before.get(key, old) for key, (new, old) in FILLED.items()}
    return ds_config | {"zero_optimization": filled | zero}


def resolve_ds_config(ds_config: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """The dict for deepspeed.initialize: with batch sizes, accumulation and clipping, and defaults for buckets and timers.

    Raises UserError if the global batch cannot be divided; see accumulation_steps.
    """
    config = config.for_world(world_size)
    ds_config = with_defaults(ds_config)
    # DeepSpeed's throughput timer waits for the GPU twice per micro-batch, and nothing reads it: the monitor has its own.
    ds_config["timers"] = {"throughput": {"enabled": False}} | ds_config.get("timers", {})
    if uses_bf16(ds_config):  # without it a non-finite gradient would be applied, unclipped
        ds_config = ds_config | {"bf16": ds_config["bf16"] | {"check_grad_overflow": True}}
    return ds_config | {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optim.max_grad_norm,
    }


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches per update and rank: global batch / (micro-batch x ranks). Raises UserError, naming sizes that work, if
    that is not an integer."""
    config = config.for_world(world_size)
    problem = batch_problem(config, world_size)
    if problem:
        raise UserError(problem)
    return config.train.global_batch_size // (batch_sizes(config).micro * world_size)


class BatchSizes(NamedTuple):
    """Images of a rank: drawn of one bucket at a time, and in a micro-batch."""

    drawn: int
    micro: int


def batch_sizes(config: Config) -> BatchSizes:
    """The batch sizes of a configuration in which `Config.for_world` has filled them in; ValueError if it has not."""
    drawn, micro = config.train.drawn_per_rank, config.train.given_micro_batch
    if drawn is None or micro is None:
        raise ValueError("train.drawn_per_rank or train.micro_batch_size is not a number; call Config.for_world first")
    return BatchSizes(drawn, micro)


def batch_problem(config: Config, world_size: int) -> str | None:
    """One line on batch sizes that do not divide each other, with the nearest sizes that work; None if they do: the ranks
    draw the global batch in equal parts, and cut what they draw into equal micro-batches."""
    field = "train.drawn_per_rank" if config.train.drawn_per_rank else "train.micro_batch_size"
    total, (drawn, micro) = config.train.global_batch_size, batch_sizes(config.for_world(world_size))
    step = drawn * world_size
    if total % step == 0:
        if drawn % micro == 0:
            return None
        return (
            f"train.micro_batch_size: {micro} does not divide the {drawn} images that a rank draws at a time "
            f"(train.drawn_per_rank); set it to {_nearest_divisors(drawn, micro)}"
        )
    wanted = config.train.drawn_per_rank or config.train.given_micro_batch or 1

    def fits(size: int) -> bool:
        return size % (min(wanted, max(1, size // world_size)) * world_size) == 0

    below = next((size for size in range(total - 1, 0, -1) if fits(size)), None)
    above = next(size for size in range(total + 1, total + wanted * world_size + 1) if fits(size))
    sizes = f"{below} or {above}" if below else str(above)
    other = "" if total % world_size else f", or {field} to {_nearest_divisors(total // world_size, drawn)}"
    return (
        f"train.global_batch_size: {total} is not a multiple of {step} ({drawn} drawn by each of {world_size} "
        f"rank{'s' * (world_size > 1)}); set it to {sizes}{other}"
    )


def divisors(number: int) -> list[int]:
    """The divisors of a positive integer, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_divisors(number: int, wanted: int) -> str:
    """The three divisors of `number` nearest to `wanted`, as text."""
    return " or ".join(map(str, sorted(sorted(divisors(number), key=lambda n: abs(n - wanted))[:3])))


def zero_stage(ds_config: dict[str, Any]) -> int:
    """2 (optimizer and gradients sharded) or 3 (weights too); 0 if the file gives none."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def bucket_elements(ds_config: dict[str, Any]) -> int:
    """Size of the bucket of gradients that are reduced at once, in elements; a larger parameter is reduced alone."""
    return int(with_defaults(ds_config)["zero_optimization"]["reduce_bucket_size"])


def sharding(ds_config: dict[str, Any]) -> dict[str, Any]:
    """What the layout of a checkpoint's optimizer shards depends on: values of DeepSpeed's file, and the order of the
    parameters (2: parameter_order.products_together; shards without a number are older)."""
    return {"zero_stage": zero_stage(ds_config), "bf16": uses_bf16(ds_config), "parameter_order": 2}


def uses_bf16(ds_config: dict[str, Any]) -> bool:
    """Whether weights and activations are bfloat16; float32 otherwise."""
    return bool(ds_config.get("bf16", {}).get("enabled"))


def weight_bytes(ds_config: dict[str, Any]) -> int:
    """Bytes per value of weights and activations: the size of `compute_dtype`, without importing torch."""
    return 2 if uses_bf16(ds_config) else 4


def sent_bytes(ds_config: dict[str, Any]) -> int:
    """Bytes per value of gradients sent to another rank."""
    sizes = {"fp32": 4, "fp16": 2, "bf16": 2}
    return sizes.get(str(ds_config.get("communication_data_type")), weight_bytes(ds_config))


def uses_kernels(config: Config, ds_config: dict[str, Any]) -> bool:
    """Whether FLUX and the connector run on megaflux_kernels: if model.kernels is on, except under ZeRO-3, which gathers a
    module's weights when its forward is called, and fused blocks do not call the forward of most of their modules."""
    return config.model.kernels == "on" and zero_stage(ds_config) != 3


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """dtype of weights and activations: torch.bfloat16 or torch.float32."""
    import torch  # here, so that the checks of the command line stay fast

    return torch.bfloat16 if uses_bf16(ds_config) else torch.float32


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values
