"""The active face of a sparse solution and its KKT solve: the HS-Jacobian with memory O(n + nonzeros).

    [H  N'] [u]   [g]
    [N  0 ] [w] = [r]       N the equality rows, the rows of K and the bounds of K

as in :mod:`hsbackend.face`, for one program. Active bounds leave the system, since they fix their variables. With a
positive diagonal H the rest is ``N_F H^-1 N_F' w = N_F H^-1 g - r`` on the free columns, solved by conjugate gradients:
products only, and dependent rows are normal input. Where these do not converge, or H is anything else, the
quasi-definite matrix with a small regularisation is factored and its solution refined by proximal steps, which a
regularisation leaves no trace in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from hsbackend._sparse_newton_kernels import face_solve
from hsbackend.face import KKTSolution
from hsbackend.program import FloatArray, IndexArray
from hsbackend.sparse_program import SparseValues, compressed

#: Relative residual of the rows at which a solve ends, and the largest one that is accepted.
_ACCURACY, _ACCEPTED = 1e-15, 1e-10
#: Products with ``N N'`` per solve, after which a factorisation is tried.
_PRODUCTS = 3000
#: Regularisation of the quasi-definite matrix, relative to its balanced entries.
_REGULARISATION = 1e-8
#: What is left of a right-hand side is out of reach when the rows combine it to less than this.
_CONSISTENT = 1e-6
#: Proximal steps at the most.
_REFINEMENTS = 60


class FaceSolveError(RuntimeError):
    """The KKT system on a face was not solved to the accuracy a derivative needs."""


@dataclass
class SparseFace:
    """Face of one sparse solution.

    Attributes:
        values: the program.
        rows: (m,) bool, the equality rows and the rows of K.
        bounds: (n,) -1 at an active lower bound, 1 at an active upper one, 0 elsewhere.
        selected: whether the face leaves the optimum directions in which it was chosen by its norm: the right-hand
            side has no part along them.
    """

    values: SparseValues
    rows: NDArray[np.bool_]
    bounds: IndexArray
    selected: bool = False
    _factor: _QuasiDefinite | None = field(default=None, repr=False)
    _along: SparseFace | None = field(default=None, repr=False)

    def along(self, vector: FloatArray) -> FloatArray:
        """Return the part of a vector (n,) in the directions in which nothing holds the optimum.

        The orthogonal projection on ``{d : H d = 0, N d = 0, d = 0 at active bounds}``.
        """
        if self._along is None:
            values = self.values
            n = values.num_variables
            if values.diagonal:
                normals, held = values.rows, self.rows
                bounds = np.where(values.hessian > 0.0, 1, self.bounds)
            else:
                normals = sp.csr_array(sp.vstack([values.hessian, values.rows], format="csr"))
                held, bounds = np.concatenate([np.ones(n, dtype=bool), self.rows]), self.bounds
            none = np.zeros(normals.shape[0])
            space = SparseValues(
                np.ones(n), np.zeros(n), compressed(normals), len(none), none, np.full(n, -np.inf), np.full(n, np.inf)
            )
            self._along = SparseFace(space, held, bounds)
        zeros = np.zeros(self._along.values.num_rows), np.zeros(len(vector))
        return self._along.kkt_solve(vector, *zeros)[0]

    def kkt_solve(
        self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Solve the system of the module docstring.

        Args:
            rhs_primal: (n,) g.
            rhs_rows: (m,) r on the rows; entries outside K are ignored.
            rhs_bounds: (n,) r on the bounds; the same.

        Returns:
            u (n,), w on the rows (m,) and w on the bounds (n,), zero outside K.

        Raises:
            FaceSolveError: if neither way gives a residual below 1e-10 of the data.
        """
        values = self.values
        if self.selected:
            rhs_primal = rhs_primal - self.along(rhs_primal)
        fixed = self.bounds != 0
        free = ~fixed
        u = np.where(fixed, rhs_bounds, 0.0)
        w = np.zeros(values.num_rows)
        solved = False
        if self._factor is None and values.diagonal and bool(np.all(values.hessian[free] > 0.0)):
            counts = np.zeros(1, dtype=np.int64)
            matrix = values.rows
            left = face_solve(
                matrix.indptr, matrix.indices, matrix.data, values.hessian, self.rows, free, rhs_primal, rhs_rows,
                _ACCURACY, _PRODUCTS, u, w, counts,
            )  # fmt: skip
            solved = left <= _ACCEPTED
        if not solved:
            if self._factor is None:
                self._factor = _QuasiDefinite.build(values, self.rows, free)
            u = np.where(fixed, rhs_bounds, 0.0)
            left = self._factor.solve(rhs_primal, rhs_rows, u, w)
            if not left <= _ACCEPTED:
                raise FaceSolveError(
                    f"the derivative's KKT system was solved to a relative residual of {left:.1e}, expected "
                    f"{_ACCEPTED:.0e}: the active rows are close to dependent"
                )
        pull = np.where(fixed, rhs_primal - values.times_hessian(u) - values.rows.T @ w, 0.0)
        return u, w, pull


@dataclass
class _QuasiDefinite:
    """Factor of ``[H + d I, N'; N, -d I]`` on the free variables and held rows, in balanced units.

    Attributes:
        places: free variables.
        held: rows of K.
        matrix: the system without d, csc.
        scale: balances it, ``scale matrix scale``.
        signs: (size,) d on the variables, -d on the rows.
        factor: of the balanced matrix with d.
        values: the program.
    """

    places: IndexArray
    held: IndexArray
    matrix: Any
    scale: FloatArray
    signs: FloatArray
    factor: Any
    values: SparseValues

    @classmethod
    def build(cls, values: SparseValues, rows: NDArray[np.bool_], free: NDArray[np.bool_]) -> _QuasiDefinite:
        """Balance and factor."""
        places, held = np.flatnonzero(free), np.flatnonzero(rows)
        hessian = values.hessian_matrix[places][:, places]
        normals = values.rows[held][:, places]
        matrix = sp.csc_array(sp.block_array([[hessian, normals.T], [normals, None]], format="csc"))
        size = matrix.shape[0]
        scale = np.ones(size)
        absolute = abs(matrix)
        for _ in range(10):
            largest = np.zeros(size)
            scaled = absolute.data * scale[absolute.indices]
            np.maximum.at(largest, absolute.indices, scaled * np.repeat(scale, np.diff(absolute.indptr)))
            largest = np.where(largest > 0.0, largest, 1.0)
            scale = scale / np.sqrt(largest)
        scale = np.exp2(np.rint(np.log2(scale)))
        signs = np.where(np.arange(size) < len(places), _REGULARISATION, -_REGULARISATION)
        left = sp.diags_array(scale)
        balanced = sp.csc_array(left @ matrix @ left + sp.diags_array(signs))
        factor = splu(balanced, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        return cls(places, held, matrix, scale, signs, factor, values)

    def solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, u: FloatArray, w: FloatArray) -> float:
        """Set the free entries of u and the held entries of w; return the relative residual left."""
        fixed_part = u.copy()
        fixed_part[self.places] = 0.0
        right = np.concatenate([
            (rhs_primal - self.values.times_hessian(fixed_part))[self.places],
            (rhs_rows - self.values.rows @ fixed_part)[self.held],
        ])  # fmt: skip
        best, missing, left = self._refined(right)
        if not left <= _ACCEPTED:
            # A cotangent of multipliers of dependent rows may ask for what no u gives: the closest that one gives.
            excess = np.where(self.signs < 0.0, missing, 0.0)
            force = np.abs(self.matrix @ excess * self.scale).max(initial=0.0)
            if force <= _CONSISTENT * np.abs(excess * self.scale).max(initial=0.0):
                best, _, left = self._refined(right - excess)
        w[:] = 0.0
        u[self.places] = best[: len(self.places)]
        w[self.held] = best[len(self.places) :]
        return left

    def _refined(self, right: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """Return the best solution, what the last one misses, and the largest relative miss of the best one."""
        solution = np.zeros(len(right))
        best, missing, least = solution, right, np.inf
        largest = float(np.abs(right * self.scale).max(initial=0.0))
        if not largest:
            return solution, right, 0.0
        stalled = 0
        for _ in range(_REFINEMENTS):
            missing = right - self.matrix @ solution
            error = float(np.abs(missing * self.scale).max(initial=0.0))
            size = max(largest, float(np.abs(solution / self.scale).max(initial=0.0)))
            stalled = 0 if error < 0.5 * least else stalled + 1
            if error < least:
                best, least = solution, error
            if not np.isfinite(error) or error <= 1e-16 * size or stalled > 3:
                break
            solution = solution + self.scale * self.factor.solve(missing * self.scale)
        return best, missing, least / largest


@dataclass(frozen=True)
class SparseFaces:
    """Faces of a batch, with the interface of the faces of :mod:`hsbackend.face`.

    Attributes:
        faces: one per item, None where it is not solved.
        active_rows: (B, m) 1 where a row is in K.
        active_bounds: (B, nb) -1, 0 or 1 for the bounded variables.
        bounded: (nb,) variables with a limit.
    """

    faces: tuple[SparseFace | None, ...]
    active_rows: IndexArray
    active_bounds: IndexArray
    bounded: IndexArray

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve item by item; items without a face get zeros."""
        u, w, z = np.zeros(rhs_primal.shape), np.zeros(rhs_rows.shape), np.zeros(rhs_bounds.shape)
        for b, face in enumerate(self.faces):
            if face is not None:
                spread = np.zeros(rhs_primal.shape[1])
                spread[self.bounded] = rhs_bounds[b]
                u[b], w[b], pull = face.kkt_solve(rhs_primal[b], rhs_rows[b], spread)
                z[b] = pull[self.bounded]
        return KKTSolution(u, w, z)
