r"""Bounds on uniform meta-stability, derived here for exactly the algorithm that `learner` runs.

Wang and Arora (NeurIPS 2024) define uniform meta-stability by the change of loss when one task of the meta-sample
*and* one example of the new task are replaced. Their constants could not be checked, so what follows is derived, and
claimed, only for this code. Notation of `learner`; G is the loss's Lipschitz constant on the ball that holds every
model visited, mu its curvature (lambda + mu > 0), and kappa = 1 for prox, 1 - (1 - eta lambda)^K for descent.

1. *Adaptation, new w.* ||u(w, D) - u(w', D)|| <= c ||w - w'||. Prox: optimality conditions and curvature give
   c = lambda / (lambda + mu). Descent on convex, beta-smooth losses with eta (beta + lambda) <= 1: a step
   u -> u - eta (grad L + lambda (u - w)) shrinks distances by 1 - eta lambda and adds eta lambda ||w - w'||, so c = 1.
2. *Adaptation, one example replaced.* The objective changes by a 2G/n-Lipschitz function, so prox moves by at most
   2G / (n (lambda + mu)); a step of descent adds 2 G eta / n, which sums to 2 G kappa / (n lambda).
3. *Adaptation, all examples replaced.* ||u - w|| <= G kappa / lambda, so at most 2 G kappa / lambda apart.
4. *Meta level.* d_t = ||w_t - w'_t|| for samples that differ in one of m tasks obeys, with gamma lambda <= 1,
   d_{t+1} <= (1 - gamma lambda + gamma lambda c) d_t + gamma lambda r / m with r from 3, or from 2 if only one
   example of the task differs. For convex losses d_T <= 2 G kappa gamma T / m (a task), and
   2 G kappa gamma T / (m n) (an example).
5. *Loss.* beta = G (c d_T + example), so for convex losses **beta = 2 G^2 kappa (gamma T / m + 1 / (lambda n))**.
6. *Generalisation.* Renaming z_11 and an independent example of the same task, and task 1 and an independent task,
   gives E[transfer risk - empirical risk] = E[l(u(A(S^(1)), D_1^(1)), z_11) - l(u(A(S), D_1), z_11)], hence
   |gap| <= beta: no further term.

Drawing tasks with replacement leaves 1 to 6 true in expectation over the draws for convex losses, as every recursion is
linear and a replaced one is met with probability 1/m.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmmlib.studies.meta.learner import strong_convexity
from dmmlib.studies.meta.tasks import Case

KINDS = ("task", "example", "adaptation", "meta")
"""What is replaced: a task of the meta-sample; an example of one of its tasks; an example of the new task; or a task
of the meta-sample and an example of the new task, which is uniform meta-stability."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of a learner on m tasks of n examples."""

    case: Case
    lipschitz: float  # G
    curvature: float  # mu

    @classmethod
    def of(cls, case: Case, radius: float) -> Bounds:
        """Take G and mu of the loss on the ball of that radius, for x of norm at most 1."""
        return cls(case, case.learner.loss.lipschitz(radius), case.learner.loss.curvature)

    @property
    def kappa(self) -> float:
        at = self.case.learner
        return 1.0 if at.inner == "prox" else 1 - (1 - at.inner_step * at.lam) ** at.inner_steps

    def adapted(self, apart: float, replaced: bool) -> float:
        """Bound how far apart two adapted models are whose w are `apart` and whose data may differ in one example.

        Raises PresetError for prox, if lambda + mu is not positive.
        """
        at, example = self.case.learner, 2 * self.lipschitz / self.case.n if replaced else 0.0
        if at.inner == "prox":
            return (at.lam * apart + example) / strong_convexity(at.lam, self.curvature)
        return apart + self.kappa * example / at.lam

    def learned(self, whole_task: bool) -> float:
        """Bound how far apart two meta-models are whose samples differ in one task, or in one example of one task."""
        at, distance = self.case.learner, 0.0
        share = at.step * at.lam
        for _ in range(at.n_steps):
            same = self.adapted(distance, replaced=False)
            far = distance + 2 * self.lipschitz * self.kappa / at.lam
            other = far if whole_task else self.adapted(distance, replaced=True)
            distance = (1 - share) * distance + share * (same + (other - same) / self.case.m)
        return distance

    def changes(self) -> dict[str, float]:
        """Bound the change of any loss, for each of `KINDS`; raises PresetError as `adapted`."""
        task, example = self.learned(whole_task=True), self.learned(whole_task=False)
        far = {"task": (task, False), "example": (example, False), "adaptation": (0.0, True), "meta": (task, True)}
        return {kind: self.lipschitz * self.adapted(*far[kind]) for kind in KINDS}
