"""How many numbers of a row each layer gets: what one size for all is divided into by `whiten:K,share`.

A layer's a x b numbers are worth

    w * sum of (l_i / (l_i + d))^2 over its a first input directions * the same over its b first output directions,

the share of the damped influence's variance that they keep, as far as the layer's Fisher matrix is the product of its
two second moments (as K-FAC takes it), times w, the root mean square of the layer's gradient: a layer that hardly moves
the loss gets few numbers. What is worth most a number is taken first, as reverse water-filling does for a Gaussian
(Cover and Thomas, Elements of Information Theory, section 10.3.3). Not here: the moments (moments.py) and what is made
with the sizes (bases.py).
"""

from collections.abc import Mapping
from math import prod, sqrt

import numpy as np

STEP = 8  # how much longer a side may get at once; in a byte are eight signs, so that numbers are counted by eights

Spectrum = dict[str, np.ndarray]  # by side, eigenvalues in falling order
Sizes = dict[str, int]  # by side


def share(spectra: Mapping[str, Spectrum], size: int, *, damping: float) -> dict[str, Sizes]:
    """The sizes of each block's sides, at least 1, of `size` numbers a block in the mean.

    A block whose numbers are worth less than all others' has one: even the few that would fill its byte are noise.

    Args:
        size: 8 or more, so that there are enough for each.
        damping: of a basis, relative to the mean eigenvalue of a side.
    """
    left = size * len(spectra)
    worths = {name: _Worth(spectrum, damping) for name, spectrum in spectra.items()}
    left -= sum(cost(worth.sizes) for worth in worths.values())
    moves = {name: move for name, worth in worths.items() if (move := worth.best(left))}
    while moves:
        name = max(moves, key=lambda name: moves[name][0])
        sizes = moves.pop(name)[1]
        worth = worths[name]
        price = cost(sizes) - cost(worth.sizes)
        if price <= left:
            left, worth.sizes = left - price, sizes
        if move := worth.best(left):
            moves[name] = move
    return {name: dict(zip(spectra[name], worth.sizes, strict=True)) for name, worth in worths.items()}


def cost(sizes: tuple[int, ...]) -> int:
    """Numbers that a block of these sides takes, by eights."""
    return -(-prod(sizes) // STEP) * STEP


class _Worth:
    """What a block's numbers are worth, and how many it has."""

    def __init__(self, spectrum: Spectrum, damping: float) -> None:
        self.sizes: tuple[int, ...] = (1,) * len(spectrum)
        self.weight = sqrt(prod(float(values.sum()) for values in spectrum.values()))
        if len(spectrum) == 1:
            self.weight = sqrt(self.weight)  # of a vector, whose one moment is that of the whole gradient
        self.sums = [_kept(values, damping) for values in spectrum.values()]
        self.step = STEP if len(spectrum) == 2 else STEP * STEP

    def best(self, most: int) -> tuple[float, tuple[int, ...]] | None:
        """The longer sides that are worth most a number, of those that take at most `most` more; and what they are
        worth a number. None if there are none worth anything."""
        reach = [sums[size : size + self.step + 1] for sums, size in zip(self.sums, self.sizes, strict=True)]
        worth = reach[0] if len(reach) == 1 else np.outer(*reach)
        here, found = float(worth.flat[0]), None
        for place in np.ndindex(*worth.shape):
            sizes = tuple(size + more for size, more in zip(self.sizes, place, strict=True))
            price = cost(sizes) - cost(self.sizes)
            gain = self.weight * (float(worth[place]) - here)
            if 0 < price <= most and gain > 0 and (found is None or (gain / price, gain) > found[:2]):
                found = (gain / price, gain, sizes)
        return None if found is None else (found[0], found[2])


def _kept(values: np.ndarray, damping: float) -> np.ndarray:
    """[p + 1]: at k what the first k directions are worth; 0 where there is no gradient."""
    mean = float(values.mean())
    each = (values / (values + damping * mean)) ** 2 if mean > 0 else np.zeros(len(values))
    return np.concatenate([[0.0], np.cumsum(each)])
