"""Conjugate gradients on the Gauss-Newton matrix of a sample of the rows, preconditioned by EK-FAC.

H = (1/n) sum over rows of J^T (diag p - p p^T) J plus each block's damping, with J the derivative of a row's logits by
the tracked parameters: the true Fisher matrix, between blocks too. It is never formed; a product is a forward-mode and
a reverse-mode derivative (Martens, ICML 2010). A query's gradient is solved at full size, some queries in lockstep.
Not here: the preconditioner (kron.py), what is done with the answer (solving.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from influent.artifact import digest
from influent.collect import inputs_of
from influent.damping import Damping
from influent.errors import NumericsError, SpecError
from influent.fitting import Health
from influent.kron import KronFull
from influent.kronname import KronName
from influent.layers import device_of
from influent.parameters import from_parameters, to_parameters, tracked
from influent.passes import Passes
from influent.progress import Progress
from influent.rng import Stream
from influent.task import Logits

Vectors = dict[str, Tensor]  # block -> [Q, I * O]
ENOUGH = 1e-6  # a relative residual that rounding in float32 does not better


class GaussNewton:
    """H v without damping, over a sample of the rows.

    Raises:
        SpecError: the task's loss is not told as a cross-entropy of logits.
    """

    def __init__(self, passes: Passes) -> None:
        if not isinstance(passes.task, Logits):
            raise SpecError(
                f"{type(passes.task).__name__} has no logits, which the Gauss-Newton matrix is made of: give it the "
                "method, or use --curvature ekfac"
            )
        self.passes, self.task = passes, passes.task
        self.whole = _Whole(passes.model, passes.task)

    def __call__(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """[Q, I * O] by block, multiplied."""
        plan, passes = self.passes.plan, self.passes
        tangents = to_parameters(plan, vectors)
        total = {name: torch.zeros_like(tangent) for name, tangent in tangents.items()}
        count = 0
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            for items in passes.batches():
                inputs, _ = inputs_of(passes.task, [item.part for item in items], device_of(passes.model))
                for name, product in self._product(inputs, tangents).items():
                    total[name] += product
                count += sum(item.number == 0 for item in items)
        return from_parameters(plan, {name: each / max(1, count) for name, each in total.items()})

    def _product(self, inputs: Any, tangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of one batch, summed over its rows, [Q, ...] by parameter."""
        point = tracked(self.passes.plan)
        weights: list[Tensor] = []

        def logits(parameters: Mapping[str, Tensor]) -> Tensor:
            named = {f"model.{name}": each for name, each in parameters.items()}
            found, weight = functional_call(self.whole, named, (inputs,))
            weights.append(weight)
            return found

        found, pull, *_ = vjp(logits, point)
        share, weight = found.float().softmax(dim=1), weights[0].unsqueeze(1)

        def one(tangent: dict[str, Tensor]) -> Mapping[str, Tensor]:
            _, change, *_ = jvp(logits, (point,), (tangent,))
            change = change.float()
            curved = weight * share * (change - (share * change).sum(dim=1, keepdim=True))
            return pull(curved.to(found.dtype))[0]

        names = list(tangents)
        each = [one({name: tangents[name][i] for name in names}) for i in range(len(tangents[names[0]]))]
        return {name: torch.stack([answer[name] for answer in each]) for name in names}


class _Whole(nn.Module):
    """The model up to the logits that its loss is made of, as one module."""

    def __init__(self, model: nn.Module, task: Logits) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return self.task.logits(self.model, inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """x with H x ~ b, and of each query |H x - b| / |b| as lengths under the preconditioner, in which it falls
    steadily where plain lengths need not."""

    x: Vectors
    residual: Tensor  # [Q]


def conjugate_gradients(
    product: Callable[[Vectors], Vectors],
    precondition: Callable[[Vectors], Vectors],
    b: Vectors,
    *,
    iterations: int,
    tell: Callable[[int], None] | None = None,
) -> Solution:
    """Preconditioned conjugate gradients, a solve a query, in lockstep; a query that is solved rests.

    Raises:
        NumericsError: a number is not finite, the matrix has no positive curvature, or nothing was gained.
    """
    x = {key: torch.zeros_like(each) for key, each in b.items()}
    r = {key: each.clone() for key, each in b.items()}
    z = precondition({key: each.clone() for key, each in r.items()})
    d, rz = {key: each.clone() for key, each in z.items()}, _dot(r, z)
    first = rz.clone()
    for step in range(iterations):
        hd = product(d)
        curved = _dot(d, hd)
        busy = rz > ENOUGH**2 * first
        if not bool(curved.isfinite().all()) or bool((curved[busy] <= 0).any()):
            raise NumericsError(
                f"conjugate gradients: no positive curvature along iteration {step + 1}'s direction: raise the damping"
            )
        alpha = torch.where(busy, rz / curved.clamp(min=torch.finfo(curved.dtype).tiny), 0.0)
        for key in x:
            x[key] += alpha.to(x[key].dtype)[:, None] * d[key]
            r[key] -= alpha.to(x[key].dtype)[:, None] * hd[key]
        z = precondition({key: each.clone() for key, each in r.items()})
        new = _dot(r, z)
        beta = torch.where(busy, new / rz.clamp(min=torch.finfo(rz.dtype).tiny), 0.0)
        d = {key: z[key] + beta.to(z[key].dtype)[:, None] * d[key] for key in d}
        rz = new
        if tell is not None:
            tell(step + 1)
    residual = torch.where(first > 0, (rz / first.clamp(min=torch.finfo(first.dtype).tiny)).sqrt(), 0.0)
    _check(residual, iterations)
    return Solution(x, residual)


def _check(residual: Tensor, iterations: int) -> None:
    worst = float(residual.max())
    if not worst < 1:
        raise NumericsError(
            f"conjugate gradients: after {iterations} iterations a residual is {worst:.3g} of what it was: "
            "raise the number of iterations or the damping, or use --curvature ekfac"
        )


def _dot(a: Vectors, b: Vectors) -> Tensor:
    return torch.stack([(a[key].double() * b[key].double()).sum(1) for key in a]).sum(0)


class ConjugateGradients:
    """A curvature of whole gradients (fitting.py): EK-FAC improved by so many iterations."""

    def __init__(
        self, name: KronName, passes: Passes, preconditioner: KronFull, damping: Damping, progress: Progress | None
    ) -> None:
        rows, wanted = passes.rows, min(name.rows or len(passes.rows), len(passes.rows))
        drawn = Stream(passes.seed, "", "cg", "rows").subset(len(rows), wanted).tolist()
        self.product = GaussNewton(replace(passes, rows=[rows[i] for i in drawn]))
        self.preconditioner, self.iterations, self.progress = preconditioner, name.iterations or 1, progress
        self.name = str(name.damped(damping))
        self.digest = digest({"curvature": str(name.basis), "preconditioner": preconditioner.digest})
        self.amounts = {key: health["lambda"] for key, health in preconditioner.health().items()}
        self._residuals: list[float] = []

    def precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """As that of EK-FAC, after the iterations; raises as `conjugate_gradients`."""

        def product(vectors: Vectors) -> Vectors:
            return {key: hv + self.amounts[key] * vectors[key] for key, hv in self.product(vectors).items()}

        def tell(step: int) -> None:
            if self.progress is not None:
                self.progress("conjugate gradients", step, self.iterations)

        found = conjugate_gradients(
            product, self.preconditioner.precondition, gradients, iterations=self.iterations, tell=tell
        )  # fmt: skip
        self._residuals += found.residual.tolist()
        return found.x

    def health(self) -> Health:
        """That of the preconditioner."""
        return self.preconditioner.health()

    def facts(self) -> dict[str, Any]:
        """`convergence`: iterations, rows of the sample, and the relative residuals of the queries solved so far."""
        found = torch.tensor(self._residuals or [float("nan")])
        residual = {"median": float(found.median()), "largest": float(found.max())} if self._residuals else None
        return {
            "convergence": {
                "iterations": self.iterations, "rows": len(self.product.passes.rows), "residual": residual
            }
        }  # fmt: skip
