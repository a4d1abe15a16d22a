"""launch/train.py with random weights, made on each rank's device: for machines without the published weights.

For measuring only: speed, memory, saving and resuming are as with real weights, but the trained model is useless. Options and
exit codes are those of launch/train.py. The configuration names no weights: `model.flux` is null and `model.vlm` null or
`tiny`, and the sizes are in `model.flux_config` and `model.vlm_config`. `model.vae` is `tiny`, a folder that needs only a
config.json, or null for FLUX.1's VAE. --dry-run is that of launch/train.py, which needs the VAE's weights too.

    deepspeed launch/train_random.py --preset dev --model.flux null --model.vlm null
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for launch/, which is not installed

from launch import train
from megaflux.common.errors import exit_on_user_error
from megaflux.common.paths import SHIPPED, SHIPPED_SOURCES
from megaflux.config.schema import Config
from megaflux.training.planning.checks import find_problems


def main() -> int | None:
    return train.main(load, problems, train.build_parser("launch/train_random.py", __doc__))


def problems(config: Config, ds_config: dict[str, Any], ranks: int) -> list[str]:
    """What would stop the run, one line each: the checks of launch/train.py without those of weights, which are not read."""
    model, found = config.model, []
    for field, source in (
        ("flux", model.flux),
        ("vlm", None if model.vlm == SHIPPED else model.vlm),
        ("init", model.init),
    ):
        if source:
            found.append(
                f"model.{field}: {source}, but launch/train_random.py reads no weights; set model.{field} to null, or "
                "start launch/train.py"
            )
    named = model.vae is None or model.vae in SHIPPED_SOURCES["vae"]
    if not named and not (Path(str(model.vae)) / "config.json").is_file():
        found.append(
            f"model.vae: {model.vae} holds no config.json; give a folder with one, tiny, tiny-icons, or null for FLUX.1's VAE"
        )
    unread = model.model_copy(update={"flux": None, "vlm": None, "vae": "tiny", "init": None})
    return [*found, *find_problems(config.model_copy(update={"model": unread}), ds_config, ranks)]


def load(*given: Any) -> Any:
    """(config, device, dtype) -> Models. Imports the heavy libraries here, after bad input is answered."""
    from megaflux.bench.random_models import random_models

    return random_models(*given)


if __name__ == "__main__":
    exit_on_user_error(main)
