"""What cvxpylayers' canonical form means: from its maps to a :class:`hsbackend.program.Program`.

cvxpy writes a cone program as ``minimise 1/2 x'Px + q'x + const`` with rows ``C x + d`` in a product of cones, the zero
cone first, then the non-negative one, then the others. Every number is an affine function of the stacked parameters:
``reduced_P.reduced_mat``, ``q`` and ``reduced_A.reduced_mat`` are those maps, with the values of ``[C d]`` in column
order and the offset of the map in its last column. With ``A = -C`` and ``b = d`` that is ``A x = b`` and ``A x <= b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.reductions.solvers.conic_solvers.scs_conif import SCS
from cvxpy.settings import PARAM_PROB
from cvxpy.utilities import scopes
from cvxpylayers.utils import parse_args

from hsbackend.differentiate import Output
from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries, Program
from hsbackend.status import UnsupportedProblemError


class CanonicalForm(SCS):
    """The canonical form we ask cvxpy for: that of SCS, which keeps bounds as rows and orders cones as diffcp does.

    cvxpy refuses SCS a problem without constraints of the user's own, though the canonical form of a piecewise-linear
    objective has rows; we take it.

    Args:
        quadratic: whether the objective may stay quadratic; otherwise it becomes a second-order cone.
    """

    REQUIRES_CONSTR = False

    def __init__(self, quadratic: bool) -> None:
        """Keep the choice."""
        super().__init__()
        self._quadratic = quadratic

    def name(self) -> str:
        """Return a name that no solver of cvxpy has."""
        return "HSBACKEND" if self._quadratic else "HSBACKEND_CONIC"

    def supports_quad_obj(self) -> bool:
        """Return whether the objective may stay quadratic."""
        return self._quadratic


QUADRATIC, CONIC = CanonicalForm(True), CanonicalForm(False)


def is_dpp(problem: cp.Problem) -> bool:
    """Whether the data of the quadratic canonical form are affine in the parameters.

    cvxpy's own answer leaves out that it canonicalises the constraints, too, by the rules of that form.
    """
    with scopes.quad_form_dpp_scope():
        constraints = all(constraint.is_dcp(dpp=True) for constraint in problem.constraints)
    return constraints and bool(problem.is_dpp(quad_form_dpp="qp"))  # pyright: ignore[reportCallIssue]


def name_quad_form_arguments(problem: cp.Problem) -> cp.Problem:
    """Replace ``quad_form(x - p, P)`` in the objective by ``quad_form(t, P), t == x - p`` with a new variable t.

    With a parameter p in the argument the quadratic canonical form would be quadratic in p, and cvxpy refuses it.
    Constraints are appended, so that those of the user keep their objects and numbers.
    """
    definitions: list[cp.Constraint] = []

    def rewrite(expression: Any) -> Any:
        if isinstance(expression, QuadForm):
            argument, matrix = expression.args
            if not argument.parameters() or not argument.is_affine():
                return expression
            variable = cp.Variable(argument.shape)
            definitions.append(variable == argument)
            return cp.quad_form(variable, matrix)
        parts = [rewrite(part) for part in expression.args]
        if all(new is old for new, old in zip(parts, expression.args, strict=True)):
            return expression
        return expression.copy(parts)

    objective = type(problem.objective)(rewrite(problem.objective.expr))
    return cp.Problem(objective, [*problem.constraints, *definitions])


@dataclass(frozen=True)
class Canonical:
    """The canonical form of one layer, with its maps still in the host's parameter order.

    Attributes:
        num_variables: n.
        cones: sizes, ``{"zero": .., "nonneg": .., "soc": [..], "exp": .., "psd": [..], "p3d": [..], "pnd": [..]}``.
        quadratic: (nnzP, parameters + 1) map of the values of P, or None.
        quadratic_rows, quadratic_columns: places of those values.
        linear: (n, parameters + 1).
        rows: (nnz, parameters + 1) map of the values of ``[C d]``.
        row_index, column_index: places of those values; column n is d.
    """

    num_variables: int
    cones: dict[str, Any]
    quadratic: Any
    quadratic_rows: IndexArray
    quadratic_columns: IndexArray
    linear: Any
    rows: Any
    row_index: IndexArray
    column_index: IndexArray
    num_rows: int = field(default=0)

    @classmethod
    def read(cls, ctx: Any) -> Canonical:
        """Read a ``LayersContext``."""
        linear = sp.csr_array(ctx.q)
        n = linear.shape[0] - 1
        if ctx.reduced_P is not None and ctx.reduced_P.reduced_mat is not None:
            quadratic = sp.csr_array(ctx.reduced_P.reduced_mat)
            indices, indptr, _ = ctx.reduced_P.problem_data_index
            p_rows, p_columns = _places(indices, indptr)
        else:
            quadratic, p_rows, p_columns = None, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        place = ctx.reduced_A.problem_data_index  # None without constraints
        indices, indptr, (m, _) = place if place is not None else ([], np.zeros(n + 2, dtype=np.int64), (0, n + 1))
        row_index, column_index = _places(indices, indptr)
        dims = ctx.cone_dims
        cones = {
            "zero": int(dims.zero),
            "nonneg": int(dims.nonneg),
            "soc": [int(size) for size in dims.soc],
            "exp": int(dims.exp),
            "psd": [int(size) for size in dims.psd],
            "p3d": list(dims.p3d),
            "pnd": list(getattr(dims, "pnd", [])),
        }
        mapped = ctx.reduced_A.reduced_mat
        rows = sp.csr_array((0, linear.shape[1])) if mapped is None else sp.csr_array(mapped)
        return cls(
            n, cones, quadratic, p_rows, p_columns, linear[:n], rows, row_index, column_index, int(m)
        )  # fmt: skip

    def foreign_cone(self) -> str | None:
        """Name the first cone that is not polyhedral, or None."""
        if self.cones["soc"]:
            return f"second-order cone of dimension {self.cones['soc'][0]}"
        if self.cones["psd"]:
            return f"positive semidefinite cone of order {self.cones['psd'][0]}"
        if self.cones["exp"]:
            return f"{self.cones['exp']} exponential cones" if self.cones["exp"] > 1 else "exponential cone"
        if self.cones["p3d"] or self.cones["pnd"]:
            return "power cone"
        return None


def _places(indices: Any, indptr: Any) -> tuple[IndexArray, IndexArray]:
    """Rows and columns of compressed sparse column storage."""
    columns = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return np.asarray(indices, dtype=np.int64), columns.astype(np.int64)


@dataclass(frozen=True)
class Parametrisation:
    """How the parameters of a program relate to the host's: ``p_host = selection @ p + constant 1``.

    Attributes:
        selection: (host parameters + 1, parameters + 1) sparse.
        sizes: number of entries of each parameter.
    """

    selection: Any
    sizes: tuple[int, ...]

    @classmethod
    def of_user(cls, ctx: Any) -> Parametrisation:
        """Parameters as the user passes them: one tensor each, flattened in row-major order.

        The host stacks them in an order of its own, each in column-major order, symmetric ones by upper triangle.
        """
        shapes = [tuple(int(size) for size in parameter.shape) for parameter in ctx.parameters]
        sizes = tuple(int(np.prod(shape)) for shape in shapes)
        begin = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        slots: list[IndexArray] = [np.zeros(0, dtype=np.int64)] * len(shapes)
        for index, shape in enumerate(shapes):
            places = np.arange(sizes[index], dtype=np.int64).reshape(shape)
            triangle = ctx.param_triu_indices[index] if ctx.param_triu_indices else None
            order = (
                places.ravel(order="F") if triangle is None else places[np.array(triangle[0]), np.array(triangle[1])]
            )
            slots[ctx.user_order_to_col_order[index]] = begin[index] + order
        source = np.concatenate([*slots, [begin[-1]]]).astype(np.int64)
        shape = (len(source), int(begin[-1]) + 1)
        return cls(sp.csr_array((np.ones(len(source)), (np.arange(len(source)), source)), shape=shape), sizes)


def user_maps(canonical: Canonical, parametrisation: Parametrisation) -> tuple[Any, Any, Any]:
    """Return the maps of P, q and [C d] in the parameters of the user."""
    select = parametrisation.selection
    quadratic = None if canonical.quadratic is None else canonical.quadratic @ select
    return quadratic, canonical.linear @ select, canonical.rows @ select


@dataclass(frozen=True)
class HostValues:
    """The stock layer hands over evaluated values: those entries that depend on a parameter are our parameters.

    Attributes:
        moving: for P, q and [C d]: which of the host's values vary.
        maps: the maps of P, q and [C d] in those values.
        sizes: how many vary.
    """

    moving: tuple[IndexArray, IndexArray, IndexArray]
    maps: tuple[Any, Any, Any]
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, canonical: Canonical) -> HostValues:
        """Find what varies; the constant rest goes into the offset column."""
        sources = (canonical.quadratic, canonical.linear, canonical.rows)
        moving: list[IndexArray] = []
        for source in sources:
            if source is None:
                moving.append(np.zeros(0, dtype=np.int64))
            else:
                moving.append(np.flatnonzero(np.diff(sp.csr_array(source[:, :-1]).indptr)).astype(np.int64))
        sizes = (len(moving[0]), len(moving[1]), len(moving[2]))
        total = sum(sizes)
        maps: list[Any] = []
        begin = 0
        for source, index in zip(sources, moving, strict=True):
            if source is None:
                maps.append(None)
                continue
            offset = np.asarray(source[:, [-1]].todense()).ravel().astype(np.float64)
            offset[index] = 0.0
            fixed = np.flatnonzero(offset)
            data = np.concatenate([np.ones(len(index)), offset[fixed]])
            rows = np.concatenate([index, fixed])
            columns = np.concatenate([begin + np.arange(len(index)), np.full(len(fixed), total)])
            maps.append(sp.csr_array((data, (rows, columns)), shape=(source.shape[0], total + 1)))
            begin += len(index)
        return cls((moving[0], moving[1], moving[2]), (maps[0], maps[1], maps[2]), sizes)


def outputs(ctx: Any) -> list[Output]:
    """Translate the host's recovery records: where each returned tensor is, in row-major order."""
    found: list[Output] = []
    for variable, record in zip(ctx.variables, ctx.var_recover, strict=True):
        if record.source == "primal" and (variable.attributes["diag"] or variable.attributes["sparsity"]):
            raise UnsupportedProblemError(
                f"variable {variable.name()} has the attribute diag or sparsity, which cvxpylayers does not recover; "
                "return a variable of the entries instead and place them with cp.diag or a constant matrix."
            )
        part = record.primal if record.source == "primal" else record.dual
        places = np.arange(part.start, part.stop, dtype=np.int64)
        shape = tuple(int(size) for size in record.shape)
        if record.unpack_fn == "svec_primal":
            full = np.zeros(shape, dtype=np.int64)
            upper = np.triu_indices(shape[0])
            full[upper] = places
            full.T[upper] = places
            columns = full.ravel()
        else:
            columns = places.reshape(shape, order="F").ravel()
        found.append(Output("primal" if record.source == "primal" else "multipliers", columns, shape))
    return found


def returned_variables(canonical: Canonical, wanted: Sequence[Output]) -> Any:
    """Return (n,) bool: the entries of x that the layer returns."""
    mask = np.zeros(canonical.num_variables, dtype=bool)
    for output in wanted:
        if output.source == "primal":
            mask[output.columns] = True
    return mask


def build_program(
    canonical: Canonical, maps: tuple[Any, Any, Any], sizes: Sequence[int], returned: Any, names: Sequence[str],
    duals_wanted: bool,
) -> Program | str:  # fmt: skip
    """Write the canonical form as a program.

    Args:
        canonical: the canonical form.
        maps: maps of the values of P, q and [C d] in the parameters of the program.
        sizes: parameter sizes.
        returned: (n,) bool, variables somebody reads.
        names: (m,) names of the rows.
        duals_wanted: whether multipliers are returned.

    Returns:
        The program, or in words what makes the problem not polyhedral.
    """
    cone = canonical.foreign_cone()
    if cone is not None:
        norm = _norm_objective(canonical, maps, returned, duals_wanted)
        if norm is None:
            return cone
        canonical, maps, returned = norm
        names = [f"row {row} of the rewritten norm" for row in range(canonical.num_rows)]
    n, m = canonical.num_variables, canonical.num_rows
    quadratic_map, linear_map, rows_map = maps
    parameters = tuple(sizes)
    width = int(sum(parameters)) + 1
    if quadratic_map is None:
        quadratic_map = sp.csr_array((0, width))
    quadratic = MatrixEntries(
        (n, n), canonical.quadratic_rows, canonical.quadratic_columns, AffineMap(quadratic_map, parameters)
    )
    rows_map = sp.csr_array(rows_map)
    inside = np.flatnonzero(canonical.column_index < n)
    offset = np.flatnonzero(canonical.column_index == n)
    matrix = MatrixEntries(
        (m, n),
        canonical.row_index[inside],
        canonical.column_index[inside],
        AffineMap(-rows_map[inside], parameters),
    )
    place = sp.csr_array(
        (np.ones(len(offset)), (canonical.row_index[offset], np.arange(len(offset)))), shape=(m, len(offset))
    )
    rhs = AffineMap(sp.csc_array(place @ rows_map[offset]), parameters)
    return Program(
        n, canonical.cones["zero"], quadratic, AffineMap(linear_map, parameters), matrix, rhs, returned, tuple(names)
    )


def _norm_objective(
    canonical: Canonical, maps: tuple[Any, Any, Any], returned: Any, duals_wanted: bool
) -> tuple[Canonical, tuple[Any, Any, Any], Any] | None:
    """Rewrite ``minimise c t, (t, F x + f) in the second-order cone`` as ``minimise 1/2 ||r||^2, r = F x + f``.

    Both have the same minimiser x (the norm and its square are minimised at the same points), with the same
    multipliers only up to a factor: where multipliers are returned the rewriting does not apply.
    """
    cones = canonical.cones
    others = cones["exp"] or cones["psd"] or cones["p3d"] or cones["pnd"]
    quadratic_map, linear_map, rows_map = maps
    if len(cones["soc"]) != 1 or others or duals_wanted:
        return None
    if quadratic_map is not None and sp.csr_array(quadratic_map).count_nonzero():
        return None
    linear = sp.csr_array(linear_map)
    linear.eliminate_zeros()
    costs = np.flatnonzero(np.diff(linear.indptr))
    if len(costs) != 1 or linear[:, :-1].count_nonzero() or float(linear[int(costs[0]), -1]) <= 0.0:
        return None
    t = int(costs[0])
    first = cones["zero"] + cones["nonneg"]
    size = cones["soc"][0] - 1
    n = canonical.num_variables
    rows_map = sp.csr_array(rows_map)
    nonzero = np.diff(rows_map.indptr) > 0
    entries_t = np.flatnonzero((canonical.column_index == t) & nonzero)
    entries_first = np.flatnonzero((canonical.row_index == first) & nonzero)
    if returned[t] or not np.array_equal(entries_t, entries_first) or len(entries_t) != 1:
        return None
    entry = rows_map[[int(entries_t[0])]]
    if entry[:, :-1].count_nonzero() or float(entry[0, -1]) <= 0.0:
        return None
    # New rows, equalities: s_i - r_i = 0 with s = C x + d (cone rows), and t = 0; then the old rows.
    zero, nonneg = cones["zero"], cones["nonneg"]
    shift = np.full(canonical.num_rows, -1, dtype=np.int64)
    shift[:zero] = np.arange(zero)
    shift[first + 1 : first + 1 + size] = zero + np.arange(size)
    shift[zero : zero + nonneg] = zero + size + 1 + np.arange(nonneg)
    keep = np.flatnonzero(shift[canonical.row_index] >= 0)
    column = canonical.column_index[keep]
    column = np.where(column == n, n + size, column)  # the offset column moves behind the new variables
    width = rows_map.shape[1]
    extra_rows = np.concatenate([zero + np.arange(size), [zero + size]])
    extra_columns = np.concatenate([n + np.arange(size), [t]])
    extra_values = np.concatenate([-np.ones(size), [1.0]])
    extra = sp.csr_array((extra_values, (np.arange(size + 1), np.full(size + 1, width - 1))), shape=(size + 1, width))
    unit = sp.csr_array((np.ones(size), (np.arange(size), np.full(size, width - 1))), shape=(size, width))
    new = Canonical(
        n + size,
        {**cones, "zero": zero + size + 1, "soc": []},
        unit,
        n + np.arange(size),
        n + np.arange(size),
        None,
        None,
        np.concatenate([shift[canonical.row_index[keep]], extra_rows]).astype(np.int64),
        np.concatenate([column, extra_columns]).astype(np.int64),
        zero + size + 1 + nonneg,
    )
    linear_new = sp.csr_array((n + size, width))
    rows_new = sp.csr_array(sp.vstack([rows_map[keep], extra]))
    return new, (unit, linear_new, rows_new), np.concatenate([returned, np.zeros(size, dtype=bool)])


def row_names(ctx: Any, canonical: Canonical) -> list[str]:
    """Name every row, after the user's constraint it came from: ``row 7 (constraint 2, entry 0: x <= cap)``."""
    names = [f"row {row}" for row in range(canonical.num_rows)]
    if ctx.gp:
        return names
    scope = scopes.quad_form_dpp_scope() if ctx.solver.supports_quad_obj else nullcontext()
    with scope:  # answered from the problem's cache
        data, chain, _ = ctx.problem.get_problem_data(solver=ctx.solver.canon_solver_name)
    slices = parse_args._build_constr_id_to_slice(data[PARAM_PROB])
    renamed = chain.compose_constr_id_map()
    for number, constraint in enumerate(ctx.problem.constraints):
        text = str(constraint)
        text = f": {text}" if len(text) <= 40 and "\n" not in text else ""  # constants print as whole matrices
        place = slices.get(renamed.get(constraint.id, constraint.id))
        if place is not None:
            for row in range(place.start, min(place.stop, canonical.num_rows)):
                names[row] += f" (constraint {number}, entry {row - place.start}{text})"
    return names


def scatter_columns(values: FloatArray, index: IndexArray, size: int) -> FloatArray:
    """Place (B, k) values at columns of a zero (B, size) array."""
    out = np.zeros((values.shape[0], size))
    out[:, index] = values
    return out
