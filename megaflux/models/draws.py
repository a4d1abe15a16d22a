"""Random weights that are the same on every CPU, for whatever the libraries' modules draw while they are built.

torch's own normal_ and uniform_ differ in their last bits between instruction sets (ATEN_CPU_CAPABILITY), and so did runs
that started on one kind of machine and resumed on another. Here a number is computed from 32 random bits by additions,
multiplications, divisions and square roots in float64, one numpy call each: IEEE 754 defines the result of each, and
nothing can be contracted between two calls. No library's logarithm or cosine is used, since those differ as well, by about
1e-16: rounded to float32 that changes one number in 10^8, some in any model of a billion. Scales are rounded to 24 bits
first, as they may come from a library's pow.

The bits are those of numpy's PCG64, a stream that numpy guarantees (NEP 19); numpy's Generator, which derives numbers from
them, may change.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Way = Literal["portable", "torch"]
CHUNK = 1 << 15  # numbers at a time: they stay in the cache

# Algorithm AS 241, PPND16 (M. J. Wichura, Applied Statistics 37, 1988): the normal distribution's quantiles to
# 16 digits, highest power first. Two of its three regions: 32 bits reach no further than exp(-25) from the ends.
_CENTRE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
_TAIL = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
_LN2 = 0.6931471805599453


class Draws:
    """A stream of numbers that depends only on a seed and a name."""

    def __init__(self, seed: int, name: str):
        """name: of the part that is drawn, so that two parts of one seed share no numbers."""
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, int.from_bytes(name.encode(), "little")]))

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float32 (count,), uniformly distributed from low (included) to high (excluded)."""
        low, high = _scale(low), _scale(high)
        below = np.nextafter(np.float32(high), np.float32(low))
        out = np.empty(count, np.float32)
        for chunk in self._chunks(out):
            values = self._shares(len(chunk))
            values *= high - low
            values += low
            chunk[:] = values
        return np.minimum(out, below, out=out) if high > low else out

    def normal(self, count: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """float32 (count,), normally distributed, all within 6.4 std of the mean."""
        mean, std = _scale(mean), _scale(std)
        out = np.empty(count, np.float32)
        for chunk in self._chunks(out):
            values = quantiles(self._shares(len(chunk)))
            values *= std
            values += mean
            chunk[:] = values
        return out

    @staticmethod
    def _chunks(out: np.ndarray) -> list[np.ndarray]:
        return [out[start : start + CHUNK] for start in range(0, len(out), CHUNK)]

    def _shares(self, count: int) -> np.ndarray:
        """float64 (count,): the middles of 2**32 equal parts of 0 to 1, exact."""
        words = self._bits.random_raw((count + 1) // 2).astype("<u8", copy=False)
        values = words.view("<u4")[:count].astype(np.float64)
        values += 0.5
        values *= 2.0**-32
        return values


def quantiles(shares: np.ndarray) -> np.ndarray:
    """Quantiles of the standard normal distribution: float64 (N,) of shares within 2**-33 to 1 - 2**-33."""
    centred = shares - 0.5
    square = centred * centred
    values = _ratio(_CENTRE, 0.180625 - square)
    values *= centred
    (tails,) = np.nonzero(np.abs(centred) > 0.425)
    share = shares[tails]
    far = _ratio(_TAIL, np.sqrt(-_log(np.minimum(share, 1.0 - share))) - 1.6)
    values[tails] = np.copysign(far, centred[tails])
    return values


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: np.ndarray) -> np.ndarray:
    numerator, denominator = (_polynomial(row, x) for row in coefficients)
    numerator /= denominator
    return numerator


def _polynomial(row: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    values = x * row[0]
    for coefficient in row[1:-1]:
        values += coefficient
        values *= x
    values += row[-1]
    return values


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm: 2 artanh((m - 1) / (m + 1)) of the mantissa m within sqrt(1/2) to sqrt(2), and the exponent's."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa[small] *= 2.0
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(tuple(2.0 / power for power in range(21, 0, -2)), ratio * ratio)
    series *= ratio
    whole = (exponent - small) * _LN2
    whole += series
    return whole


def _scale(value: float) -> float:
    return float(np.float32(value))


class _Portable(TorchDispatchMode):
    """Inside, `normal_` and `uniform_` of any tensor draw from Draws. RuntimeError for any other random operation, whose
    numbers would depend on the CPU."""

    def __init__(self, seed: int, name: str):
        super().__init__()
        self.draws = Draws(seed, name)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if packet in _FILLS and kwargs.get("generator") is None:
            names, fill = _FILLS[packet]
            given = dict(zip(names, args[1:])) | {key: kwargs[key] for key in names if key in kwargs}
            return _filled(args[0], fill, self.draws, *(given.get(key, default) for key, default in names.items()))
        if torch.Tag.nondeterministic_seeded in function.tags or packet in _TIED:
            raise RuntimeError(
                f"{function} draws in a way that depends on the CPU; draw with normal_ or uniform_, or set model.seeded torch"
            )
        return function(*args, **kwargs)


_FILLS = {
    torch.ops.aten.normal_: ({"mean": 0.0, "std": 1.0}, Draws.normal),
    torch.ops.aten.uniform_: ({"from": 0.0, "to": 1.0}, Draws.uniform),
}
"""In-place draws: their arguments' names and defaults, and their replacement."""
_TIED = {torch.ops.aten.erfinv_, torch.ops.aten.log_, torch.ops.aten.linalg_qr}
"""What trunc_normal_ (of other versions, or far from the mean) and orthogonal_ apply to a draw."""


def _filled(tensor: Tensor, fill: Any, draws: Draws, first: float, second: float) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    values = torch.from_numpy(fill(draws, tensor.numel(), first, second))
    return tensor.copy_(values.reshape(tensor.shape))


class _Torch:
    """Inside, torch draws from a seed; afterwards the global random state is as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def seeded(seed: int, name: str, way: Way = "portable") -> AbstractContextManager:
    """A context in which modules are built with weights drawn from a seed. name: of the module, which has its own stream.

    way: portable, the same on every CPU; torch, as in runs older than this choice (`model.seeded`). Neither changes the
    global random state."""
    return _Portable(seed, name) if way == "portable" else _Torch(seed)
