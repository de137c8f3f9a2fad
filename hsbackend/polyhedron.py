"""Polyhedra and the projection onto them.

    project(v) = argmin  1/2 sum_j h_j (x_j - v_j)^2    subject to   x in C

for C given by rows or by name. Named sets go to closed forms and to the algorithms of :mod:`hsbackend.families`; what
has no name goes to the general solvers (:mod:`hsbackend.qp_operators`). Vector sets act on the last axis of v, matrix
sets on the last two; all axes before are batch axes. Whatever describes a set may be a float or a tensor, and a tensor
may have batch axes in front, which broadcast against those of v.

Derivatives are HS-Jacobians: elements of the Han-Sun set, in the Euclidean case orthogonal projectors onto the null
space of the active normals (docs/theory.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hsbackend import sets
from hsbackend.closed_forms import Asked
from hsbackend.families.family import Choice
from hsbackend.qp import OnFailure, check_options
from hsbackend.status import InvalidOptionError


class Polyhedron:
    """The set of points that satisfy linear equations, inequalities and bounds.

        C = {x in R^n :  A x = b,  G x <= h,  lower <= x <= upper}

    The general set goes to the general solvers. The named ones have algorithms of their own: :meth:`box`,
    :meth:`halfspace`, :meth:`hyperplane`, :meth:`affine`, :meth:`simplex`, :meth:`capped_simplex`, :meth:`budget`,
    :meth:`l1_ball`, :meth:`weighted_l1_ball`, :meth:`linf_ball`, :meth:`transport`, :meth:`birkhoff`,
    :meth:`monotone`, :meth:`order`, :meth:`box_intersect_affine`, :meth:`product`.

    Args:
        A: (..., p, n) tensor, None without equations. Dependent rows are fine. Or a sparse (p, n) tensor or scipy
            matrix: see Notes.
        b: (..., p) tensor.
        G: (..., m, n) tensor, None without inequalities. Dependent rows are fine. Or sparse, as A.
        h: (..., m) tensor; an entry ``inf`` means that there is no such row.
        lower: (..., n) tensor or float; ``-inf`` means none.
        upper: (..., n) tensor or float; ``inf`` means none.

    Raises:
        ValueError: if shapes do not fit, or if nothing tells n.
        TypeError: if a tensor is not floating point.

    Notes:
        Tensors are differentiable. Those of a general set that neither require a gradient nor have batch axes are
        analysed and factored once, and again when their values change (also in place). Make the object once.

        With A or G sparse, points go to the solvers for large sparse programs (docs/large-sparse.md), one after the
        other; derivatives are of first order, one per stored entry of a sparse tensor.
    """

    def __init__(
        self, A: Any = None, b: Any = None, G: Any = None, h: Any = None, lower: Any = None, upper: Any = None
    ) -> None:
        """Find n and check the shapes."""
        self._set: sets.Set = sets.General(A, b, G, h, lower, upper)

    @classmethod
    def _of(cls, named: sets.Set) -> Polyhedron:
        new = cls.__new__(cls)
        new._set = named
        return new

    @property
    def kind(self) -> str:
        """The name of the set, ``"polyhedron"`` for one given by rows."""
        return self._set.kind

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a point, (n,) or (k1, k2)."""
        return self._set.event_shape

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the tensors that describe the set, broadcast."""
        return self._set.batch_shape

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that describe the set, by name."""
        return self._set.tensors

    def replace(self, tensors: Mapping[str, Tensor]) -> Polyhedron:
        """Return the same set with other tensors, of the names and shapes in :attr:`tensors`."""
        return self._of(self._set.replace(tensors))

    def general(self) -> sets.Rows:
        """Return the same set as rows: ``Polyhedron(*polyhedron.general())`` goes to the general solvers.

        Returns:
            ``A, b, G, h, lower, upper``, on flattened coordinates for matrix sets.

        Raises:
            UnsupportedProblemError: for l1 balls, which need 2^n rows, and products with one.
        """
        return self._set.general()

    def __repr__(self) -> str:
        """Name the set and what describes it; tensors by their shape."""
        return f"Polyhedron[{self.kind}]({self._set.describe()})"

    # -- named sets ----------------------------------------------------------------------------------------------------

    @classmethod
    def box(cls, lower: Any, upper: Any, n: int | None = None) -> Polyhedron:
        """Return the box ``{lower <= x <= upper}``.

        Args:
            lower: (..., n) tensor or float; ``-inf`` means none.
            upper: (..., n) tensor or float; ``inf`` means none.
            n: number of coordinates, needed when both bounds are floats.

        Raises:
            ValueError: if nothing tells n.

        Notes:
            O(n). A coordinate at its bound is held by ``jacobian="active"`` and free with ``"support"``.
        """
        return cls._of(sets.Box(lower, upper, n))

    @classmethod
    def halfspace(cls, a: Any, b: Any) -> Polyhedron:
        """Return the half-space ``{a'x <= b}``.

        Args:
            a: (..., n) tensor.
            b: (...,) tensor or float.

        Notes:
            O(n). Empty where ``a = 0 > b``.
        """
        return cls._of(sets.OneRow(a, b, equation=False))

    @classmethod
    def hyperplane(cls, a: Any, b: Any) -> Polyhedron:
        """Return the hyperplane ``{a'x = b}``.

        Args:
            a: (..., n) tensor.
            b: (...,) tensor or float.

        Notes:
            O(n). Empty where ``a = 0`` and ``b`` is not.
        """
        return cls._of(sets.OneRow(a, b, equation=True))

    @classmethod
    def affine(cls, A: Any, b: Any) -> Polyhedron:
        """Return the affine set ``{A x = b}``.

        Args:
            A: (..., p, n) tensor. Dependent rows are fine.
            b: (..., p) tensor.

        Notes:
            With a shared A that needs no gradient, and without weights: two products with A and its pseudo-inverse,
            which is computed once. Otherwise the general solvers. Empty where b is not in the range of A.
        """
        return cls._of(sets.Affine(A, b))

    @classmethod
    def simplex(cls, n: int, radius: Any = 1.0) -> Polyhedron:
        """Return the simplex ``{x >= 0, 1'x = radius}``.

        Args:
            n: number of coordinates.
            radius: (...,) tensor or float; empty if negative.

        Notes:
            O(n), without sorting.

        Source: Michelot (1986); Condat, "Fast projection onto the simplex and the l1 ball" (2016).
        """
        return cls._of(sets.Budget("simplex", n, {"equals": radius, "lower": 0.0}))

    @classmethod
    def capped_simplex(cls, n: int, radius: Any = 1.0, cap: Any = 1.0) -> Polyhedron:
        """Return the capped simplex ``{0 <= x <= cap, 1'x = radius}``.

        Args:
            n: number of coordinates.
            radius: (...,) tensor or float.
            cap: (..., n) tensor or float; empty if its sum is below the radius.

        Notes:
            O(n), without sorting.
        """
        return cls._of(sets.Budget("capped_simplex", n, {"equals": radius, "lower": 0.0, "upper": cap}))

    @classmethod
    def budget(
        cls, n: int, coefficients: Any = None, equals: Any = None, at_most: Any = None, at_least: Any = None,
        lower: Any = 0.0, upper: Any = None,
    ) -> Polyhedron:  # fmt: skip
        """Return a box with a budget, ``{lower <= x <= upper, at_least <= c'x <= at_most}`` or ``c'x = equals``.

        Args:
            n: number of coordinates.
            coefficients: (..., n) tensor c, of any sign; None for ones.
            equals: (...,) tensor or float; excludes the next two.
            at_most: (...,) tensor or float.
            at_least: (...,) tensor or float.
            lower: (..., n) tensor or float, None for none.
            upper: (..., n) tensor or float, None for none.

        Raises:
            ValueError: if no side of the budget is given, or ``equals`` together with another.

        Notes:
            O(n) (continuous quadratic knapsack).

        Source: Cominetti, Mascarenhas and Silva, "A Newton's method for the continuous quadratic knapsack problem"
            (2014).
        """
        if (equals is None) == (at_most is None and at_least is None):
            raise ValueError("a budget needs `equals`, or `at_most` and `at_least` or one of them")
        values = {"coefficients": coefficients, "equals": equals, "at_most": at_most, "at_least": at_least}
        return cls._of(sets.Budget("budget", n, {**values, "lower": lower, "upper": upper}))

    @classmethod
    def l1_ball(cls, n: int, radius: Any = 1.0) -> Polyhedron:
        """Return the l1 ball ``{sum_j |x_j| <= radius}``.

        Args:
            n: number of coordinates.
            radius: (...,) tensor or float; empty if negative.

        Notes:
            O(n), without sorting.

        Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008); Condat (2016).
        """
        return cls._of(sets.L1Ball(n, None, radius))

    @classmethod
    def weighted_l1_ball(cls, weights: Any, radius: Any = 1.0) -> Polyhedron:
        """Return the weighted l1 ball ``{sum_j w_j |x_j| <= radius}``.

        Args:
            weights: (..., n) tensor w > 0.
            radius: (...,) tensor or float; empty if negative.

        Notes:
            O(n), without sorting.
        """
        return cls._of(sets.L1Ball(sets.event_of("weights", weights, 1)[0], weights, radius))

    @classmethod
    def linf_ball(cls, n: int, radius: Any = 1.0) -> Polyhedron:
        """Return the l-infinity ball ``{|x_j| <= radius for all j}``.

        Args:
            n: number of coordinates.
            radius: (...,) tensor or float; empty if negative.

        Notes:
            O(n).
        """
        return cls._of(sets.LinfBall(n, radius))

    @classmethod
    def transport(cls, r: Any, c: Any) -> Polyhedron:
        """Return the transport polytope ``{X >= 0, X 1 = r, X'1 = c}`` of (k1, k2) matrices.

        Args:
            r: (..., k1) tensor, the row sums.
            c: (..., k2) tensor, the column sums; empty unless both are non-negative and have the same sum.

        Notes:
            A few Newton steps in min(k1, k2) unknowns. Acts on the last two axes. An entry ``-inf`` of v forbids that
            entry of X. Where the support falls apart into components the marginals are not independent, and
            derivatives with respect to them are those of least norm.

        Source: dual semismooth Newton method, Li, Sun and Toh, "On the efficient computation of a generalized Jacobian
            of the projector over the Birkhoff polytope" (2020).
        """
        return cls._of(sets.Transport("transport", (*sets.event_of("r", r, 1), *sets.event_of("c", c, 1)), r, c))

    @classmethod
    def birkhoff(cls, k: int) -> Polyhedron:
        """Return the Birkhoff polytope, doubly stochastic (k, k) matrices: ``{X >= 0, X 1 = 1, X'1 = 1}``.

        Args:
            k: number of rows and of columns.

        Notes:
            As for :meth:`transport`.
        """
        return cls._of(sets.Transport("birkhoff", (sets.checked_size("k", k), k), 1.0, 1.0))

    @classmethod
    def monotone(cls, n: int, increasing: bool = True, lower: Any = None, upper: Any = None) -> Polyhedron:
        """Return the monotone vectors between bounds, ``{lower <= x_1 <= ... <= x_n <= upper}``.

        Args:
            n: number of coordinates.
            increasing: False for ``upper >= x_1 >= ... >= x_n >= lower``.
            lower: (...,) tensor or float, None for none.
            upper: (...,) tensor or float, None for none; empty where it is below ``lower``.

        Notes:
            O(n): pool adjacent violators (isotonic regression). The HS-Jacobian averages over blocks.

        Source: Barlow, Bartholomew, Bremner and Brunk (1972); Best and Chakravarti (1990).
        """
        return cls._of(sets.Monotone(n, increasing, lower, upper))

    @classmethod
    def order(cls, n: int, edges: Iterable[tuple[int, int]]) -> Polyhedron:
        """Return the vectors that respect a partial order, ``{x_i <= x_j for every edge (i, j)}``.

        Args:
            n: number of coordinates.
            edges: pairs of indices.

        Raises:
            ValueError: if an index is out of range.

        Notes:
            Edges that form disjoint chains: O(n). Any other graph: the general solvers.
        """
        return cls._of(sets.Order(n, edges))

    @classmethod
    def box_intersect_affine(cls, lower: Any, upper: Any, A: Any, b: Any) -> Polyhedron:
        """Return the box with equations ``{lower <= x <= upper, A x = b}``.

        Args:
            lower: (..., n) tensor or float, None for none.
            upper: (..., n) tensor or float, None for none.
            A: (..., p, n) tensor.
            b: (..., p) tensor.

        Notes:
            One row: the algorithm of :meth:`budget`. More: the general solvers, a semismooth Newton method in p
            unknowns as long as p is moderate.
        """
        return cls._of(sets.BoxAffine(lower, upper, A, b))

    @classmethod
    def product(cls, *polyhedra: Polyhedron) -> Polyhedron:
        """Return the product of vector sets, ``{(x_1, ..., x_k) : x_i in C_i}``, concatenated along the last axis.

        Args:
            polyhedra: at least one; vector sets.

        Raises:
            ValueError: for a matrix set, or if there is none.

        Notes:
            The cost is the sum of the costs. Where one factor is empty, so is the product.
        """
        return cls._of(sets.Product([polyhedron._set for polyhedron in polyhedra]))


def project(
    v: Tensor,
    polyhedron: Polyhedron,
    *,
    weight: Tensor | None = None,
    jacobian: Choice = "active",
    on_failure: OnFailure = "raise",
) -> Tensor:
    """Project points onto a polyhedron.

        x = argmin  1/2 sum_j h_j (x_j - v_j)^2    subject to   x in C

    Args:
        v: (..., n) floating point, (..., k1, k2) for a set of matrices. Entries may be ``-inf`` or ``inf`` where the
            set bounds them (a masked entry of a simplex, a forbidden one of a transport polytope).
        polyhedron: the set C. Its batch axes broadcast against those of v.
        weight: (..., n) or (..., k1, k2) tensor h > 0, the diagonal metric; None for the Euclidean one.
        jacobian: which element of the Han-Sun set the derivative is, where there is more than one: ``"active"`` holds
            every constraint that holds with equality (to rounding), ``"support"`` those with a multiplier.
        on_failure: ``"raise"``; ``"nan"`` to return NaN for the items that fail; or, for a set given by rows,
            ``"closest"`` to project on the closest set that is not empty where C is: with the shift of the limits of
            least Euclidean norm (:func:`hsbackend.solve_qp`). Under ``torch.func.vmap`` and ``torch.compile`` failing
            items are NaN in any case.

    Returns:
        x like v: dtype, device, shape (after broadcasting the batch axes). float16 and bfloat16 are computed in
        float32, and stay float32 under autocast. Differentiable in v, the weight and every tensor of the set, to any
        order, in forward and reverse mode and under ``torch.func`` transforms; in compiled code to first order in
        reverse mode. The gradient of a tensor without batch axes is the sum over the batch. Named sets
        project CUDA tensors on their device, without waiting for it (docs/cuda.md); sets given by rows, and tensors on
        any other device, are moved to the CPU and back.

    Raises:
        SolveError: if an item has no projection (empty set, NaN) and ``on_failure="raise"``. The message names items,
            counted over the flattened batch axes. On a CUDA device it comes with a later call, see
            :func:`hsbackend.checking`.
        TypeError: if v is not floating point, or ``polyhedron`` is not a :class:`Polyhedron`.
        ValueError: if shapes do not fit.
        InvalidOptionError: if an option has an unknown value, or ``on_failure="closest"`` with a named set.

    Notes:
        The cost is that of the set's algorithm. At points where several faces meet the projection is not
        differentiable and one element of the Han-Sun set is used. An item that fails contributes zero to gradients
        where its cotangents are zero, NaN where they are not; in compiled code, for boxes, half-spaces and affine
        sets, zero.

    Source: Han and Sun, "Newton and quasi-Newton methods for normal maps with polyhedral sets" (1997).
    """
    check_options(jacobian, on_failure)
    if not isinstance(polyhedron, Polyhedron):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a hsbackend.Polyhedron, got {type(polyhedron).__name__}")
    point = _checked("v", v, polyhedron.event_shape)
    rescue = on_failure == "closest"
    if rescue:
        check_rescue(polyhedron)
    asked = Asked(jacobian, on_failure != "nan")
    scale = None if weight is None else _checked("weight", weight, polyhedron.event_shape)
    if scale is not None:
        scale = scale.to(dtype=point.dtype, device=point.device)
    device = v.device.type
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if rescue:
            x = sets.project_rows(point, scale, asked, polyhedron.general(), polyhedron.event_shape, rescue=True)
        else:
            x = polyhedron._set.project(point, scale, asked)  # pyright: ignore[reportPrivateUsage]
    return x if autocast or x.dtype == v.dtype else x.to(v.dtype)


def check_rescue(polyhedron: Polyhedron) -> None:
    """Refuse ``on_failure="closest"`` for sets that are not given by rows."""
    if polyhedron.kind == "polyhedron":
        if any(tensor.layout != torch.strided for tensor in polyhedron.tensors.values()):
            raise InvalidOptionError('on_failure="closest" is not there for sparse rows: use "raise" or "nan"')
        return
    advice = "Polyhedron(*polyhedron.general()) is the same set by rows, whose limits can be shifted"
    if polyhedron.kind in ("l1_ball", "weighted_l1_ball"):
        advice = "an l1 ball is empty only where its radius is negative: clamp the radius"
    raise InvalidOptionError(
        f'on_failure="closest" needs a polyhedron given by rows, got one of kind {polyhedron.kind!r}: {advice}'
    )


def _checked(name: str, tensor: Tensor, event: tuple[int, ...]) -> Tensor:
    """Check a point or a weight; return it in at least float32."""
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` has dtype {tensor.dtype}, expected a floating-point dtype: call `.double()` on it")
    if tuple(tensor.shape[-len(event) :]) != event:
        wanted = ", ".join(["...", *map(str, event)])
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)}, expected ({wanted}), a point of the set on the last axes"
        )
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _function(
    v: Tensor, polyhedron: Polyhedron, weight: Tensor | None, jacobian: Choice
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the projection as a function of the point, and the point with every batch axis of the result."""
    front = [v.shape, (*polyhedron.batch_shape, *polyhedron.event_shape)]
    if weight is not None:
        front.append(weight.shape)
    point = v.expand(torch.broadcast_shapes(*front))
    return lambda at: project(at, polyhedron, weight=weight, jacobian=jacobian), point


def hs_vjp(
    v: Tensor, polyhedron: Polyhedron, cotangent: Tensor, *, weight: Tensor | None = None, jacobian: Choice = "active"
) -> Tensor:
    """Return the product of a cotangent with the HS-Jacobian of a projection, ``M'g``.

    Args:
        v: as for :func:`project`.
        polyhedron: the set.
        cotangent: g, of the shape of the projection.
        weight: as for :func:`project`.
        jacobian: as for :func:`project`.

    Returns:
        ``M'g``, of the same shape.

    Raises:
        SolveError: if an item has no projection.
    """
    function, point = _function(v, polyhedron, weight, jacobian)
    pullback = torch.func.vjp(function, point)[1]
    return pullback(cotangent)[0]


def hs_jvp(
    v: Tensor, polyhedron: Polyhedron, tangent: Tensor, *, weight: Tensor | None = None, jacobian: Choice = "active"
) -> Tensor:
    """Return the product of the HS-Jacobian of a projection with a tangent, ``M d``.

    Args:
        v: as for :func:`project`.
        polyhedron: the set.
        tangent: d, of the shape of the projection.
        weight: as for :func:`project`.
        jacobian: as for :func:`project`.

    Returns:
        ``M d``, of the same shape.

    Raises:
        SolveError: if an item has no projection.
    """
    function, point = _function(v, polyhedron, weight, jacobian)
    return torch.func.jvp(function, (point,), (tangent,))[1]


def hs_jacobian(
    v: Tensor, polyhedron: Polyhedron, *, weight: Tensor | None = None, jacobian: Choice = "active"
) -> Tensor:
    """Return the HS-Jacobian of a projection as a matrix.

        M = H^-1 (H - N'(N H^-1 N')^+ N),   N the rows of the face K;  M = I - N'(N N')^+ N without weights

    Args:
        v: as for :func:`project`.
        polyhedron: the set.
        weight: as for :func:`project`; the matrix H.
        jacobian: which K: ``"active"`` or ``"support"``.

    Returns:
        (..., n, n), element (i, j) the derivative of x_i with respect to v_j; for sets of matrices on flattened
        coordinates, (..., k1 k2, k1 k2). Without weights it is symmetric and idempotent and annihilates the active
        normals.

    Raises:
        SolveError: if an item has no projection.

    Notes:
        n products; O(B n^2) memory.

    Source: Han and Sun (1997).
    """
    function, point = _function(v, polyhedron, weight, jacobian)
    event = polyhedron.event_shape
    n, batch = math.prod(event), point.shape[: point.dim() - len(event)]
    pullback = torch.func.vjp(function, point)[1]
    basis = torch.eye(n, dtype=point.dtype, device=point.device).reshape(n, *[1] * len(batch), *event)
    found = torch.func.vmap(lambda g: pullback(g)[0])(basis.expand(n, *point.shape))
    return found.reshape(n, *batch, n).movedim(0, -2)
