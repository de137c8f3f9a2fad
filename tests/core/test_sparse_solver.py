"""Programs solved by their nonzeros: against known answers, the dense way, and the pseudo-inverse written down."""

from collections import Counter
from collections.abc import Callable

import clarabel
import numpy as np
import pytest
import scipy.sparse as sp

from generators import Case, random_case
from hsbackend.differentiate import Layer, Output
from hsbackend.plan import Plan
from hsbackend.solvers import sparse, sparse_newton
from hsbackend.solvers.result import Options
from hsbackend.sparse_face import SparseFace
from hsbackend.sparse_plan import SparsePlan, prepare
from hsbackend.sparse_program import SparseValues, compressed
from hsbackend.status import Status
from known_answers import judge, known_case

ALL = frozenset("QqAb")


def projection(seed: int, n: int = 300, m: int = 80, entries: int = 4, equalities: int = 20) -> SparseValues:
    """Return a random projection on sparse rows and a box, with points on the boundary of both."""
    rng = np.random.default_rng(seed)
    place = np.repeat(np.arange(m), entries), rng.integers(0, n, m * entries)
    rows = sp.csr_array((rng.standard_normal(m * entries), place), shape=(m, n))
    inside = rng.uniform(0.0, 1.0, n)
    rhs = rows @ inside
    rhs[equalities:] += rng.random(m - equalities) * (rng.random(m - equalities) < 0.5)
    point = inside + rng.standard_normal(n)
    return SparseValues(np.ones(n), point, compressed(rows), equalities, rhs, np.zeros(n), np.ones(n))


def run_known_answers(first: int, last: int) -> tuple[list[str], Counter[str]]:
    """Judge the sparse way on problems with known answers; badly scaled ones may leave other optima unseen."""
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for seed in range(first, last):
        case = known_case(seed)
        solution = SparsePlan(case.program()).solve(case.parameters(), Options())
        for b in range(case.shape[0]):
            told = None if case.knobs.extreme or solution.status[b] else bool(solution.non_unique[b])
            verdict = judge(case, b, int(solution.status[b]), solution.primal[b], solution.multipliers[b], told)
            wrong += [f"seed {seed} item {b}: {complaint}" for complaint in verdict.complaints]
            counts["items"] += 1
            counts["given up, extreme" if case.knobs.extreme else "given up"] += verdict.not_converged
    return wrong, counts


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_known_answers(first: int) -> None:
    wrong, counts = run_known_answers(first, first + 50)
    assert not wrong, "\n".join(wrong)
    assert counts["given up"] == 0
    assert counts["given up, extreme"] <= 2


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(2_000_000, 2_005_000, 500))
def test_many_more_known_answers(first: int) -> None:
    wrong, counts = run_known_answers(first, first + 500)
    assert not wrong, "\n".join(wrong)
    assert counts["given up"] <= 0.002 * counts["items"]


def active_projector(case: Case, b: int, choice: str, multipliers: np.ndarray) -> np.ndarray:
    hessian, _, rows, rhs = case.item(b)
    slack = rhs - rows @ case.primal[b]
    member = slack <= 1e-9 if choice == "active" else np.abs(multipliers) > 1e-9
    single = (np.count_nonzero(rows, axis=1) == 1) & (slack <= 1e-9)
    fixed = (rows[single] > 0).any(axis=0) & (rows[single] < 0).any(axis=0)  # bounds that coincide hold in any case
    member |= single & (rows[:, fixed] != 0).any(axis=1)
    member[: case.equalities] = True
    normals = rows[member]
    inverse = np.linalg.inv(hessian)
    gram = np.linalg.pinv(normals @ inverse @ normals.T, rcond=1e-10)
    return inverse - inverse @ normals.T @ gram @ normals @ inverse


@pytest.mark.parametrize("choice", ["active", "support"])
@pytest.mark.parametrize("seed", range(40))
def test_the_adjoint_is_the_projector_on_the_face(seed: int, choice: str) -> None:
    """At degenerate points too: weakly active, duplicated, dependent and empty rows."""
    case = random_case(seed + 70_000)
    solution = SparsePlan(case.program()).solve(case.parameters(), Options(jacobian=choice))  # type: ignore[arg-type]
    g = np.random.default_rng(seed).normal(size=case.primal.shape)
    adjoint = SparsePlan(case.program()).adjoint(solution, g, None)
    if len(case.hessian) > 1:
        case.hessian, case.rows = case.hessian[:1], case.rows[:1]
    assert len(g) == case.shape[0]
    for b in range(case.shape[0]):
        if solution.status[b] != Status.SOLVED:  # constants of item 0 do not fit the answers of the others
            assert b > 0
            continue
        case.primal[b] = solution.primal[b]
        wanted = active_projector(case, b, choice, solution.multipliers[b]) @ g[b]
        assert np.abs(adjoint.primal[b] - wanted).max() <= 1e-7 * (1.0 + np.abs(wanted).max())


@pytest.mark.parametrize("seed", range(30))
def test_gradients_of_everything_are_those_of_the_dense_way(seed: int) -> None:
    """Matrices as parameters, gradient per entry, multipliers as outputs."""
    case = random_case(seed + 91_000, strict=True)
    _, n, m = case.shape
    outputs = [Output("primal", np.arange(n), (n,)), Output("multipliers", np.arange(m), (m,))]
    rng = np.random.default_rng(seed)
    cotangents = [rng.normal(size=(case.shape[0], size)) for size in (n, m)]
    found = []
    for plan in (SparsePlan(case.program(ALL)), Plan(case.program(ALL))):
        layer = Layer(plan, outputs)
        parameters = case.parameters(ALL)
        solution = layer.solve(parameters, Options(), "raise", None)
        summed = [len(values) == 1 for values in parameters]
        gradients = layer.pullback(solution, cotangents, [True] * 4, summed)
        found.append([solution.primal, solution.multipliers, *gradients])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7 * (1.0 + np.abs(theirs).max(initial=0.0)))


@pytest.mark.parametrize("seed", range(4))
def test_the_newton_method_agrees_with_the_interior_point_method(seed: int) -> None:
    values = projection(seed, 90, 30, equalities=10)
    newton = sparse._by_newton(values, Options(), None)  # pyright: ignore[reportPrivateUsage]
    interior = sparse._by_interior_point(values, Options())  # pyright: ignore[reportPrivateUsage]
    assert newton.status == interior.status == Status.SOLVED
    assert newton.method == "newton"
    np.testing.assert_allclose(newton.primal, interior.primal, atol=1e-9)
    assert values.residual(newton.primal, newton.rows, newton.bounds) < 1e-12


def smooth(seed: int, n: int = 120) -> SparseValues:
    """Return a QP with a tridiagonal Hessian and overlapping windows as rows."""
    rng = np.random.default_rng(seed)
    step = sp.diags_array([np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
    hessian = compressed(sp.eye_array(n) + 5.0 * step.T @ step)
    m = (n - 8) // 4
    columns = (4 * np.arange(m)[:, None] + np.arange(8)).ravel()
    rows = sp.csr_array((np.ones(8 * m), (np.repeat(np.arange(m), 8), columns)), shape=(m, n))
    ones = np.ones(n)
    return SparseValues(hessian, 3.0 * rng.standard_normal(n), compressed(rows), 2, np.full(m, 0.3), -ones, ones)


@pytest.mark.parametrize("seed", range(3))
def test_the_active_set_method_agrees_with_the_interior_point_method(seed: int) -> None:
    values = smooth(seed)
    found = sparse.solve(values, Options())
    interior = sparse._by_interior_point(values, Options())  # pyright: ignore[reportPrivateUsage]
    assert found.status == interior.status == Status.SOLVED
    assert found.method == "active set"
    assert values.residual(found.primal, found.rows, found.bounds) < 1e-12
    np.testing.assert_allclose(found.primal, interior.primal, atol=1e-9)


@pytest.mark.parametrize("make", [projection, smooth])
def test_medium_programs_agree_with_clarabel(make: Callable[[int], SparseValues]) -> None:
    values = make(5)
    n, me = values.num_variables, values.num_equalities
    unit = sp.eye_array(n, format="csc")
    rows = sp.csc_matrix(sp.vstack([values.rows, unit, -unit]))
    limits = np.concatenate([values.rhs_rows, values.upper, -values.lower])
    cones = [clarabel.ZeroConeT(me), clarabel.NonnegativeConeT(len(limits) - me)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    hessian = sp.csc_matrix(sp.triu(values.hessian_matrix))
    theirs = clarabel.DefaultSolver(hessian, -values.rhs_primal, rows, limits, cones, settings).solve()
    found = sparse.solve(values, Options())
    np.testing.assert_allclose(found.primal, np.array(theirs.x), atol=1e-6)
    ours = 0.5 * found.primal @ values.times_hessian(found.primal) - values.rhs_primal @ found.primal
    assert ours == pytest.approx(theirs.obj_val, rel=1e-9)


def test_a_good_guess_saves_steps() -> None:
    values = projection(1)
    cold = sparse_newton.solve(values, 1e-12)
    warm = sparse_newton.solve(values, 1e-12, cold.rows)
    assert warm.steps <= 2 < cold.steps
    np.testing.assert_allclose(warm.primal, cold.primal, atol=1e-12)


def test_rows_that_depend_on_each_other() -> None:
    """Duplicated, scaled, summed and empty rows change neither the point nor its derivative."""
    values = projection(2)
    rows = values.rows
    sums = rows[[0]] + rows[[1]]
    parts = [rows[:20], rows[:5] * 3.0, sums, rows[20:], rows[30:40] * 0.5, sp.csr_array((2, 300))]
    more = compressed(sp.vstack(parts))
    rhs = values.rhs_rows
    limits = np.concatenate([rhs[:20], rhs[:5] * 3.0, [rhs[0] + rhs[1]], rhs[20:], rhs[30:40] * 0.5, [0.0, 1.0]])
    again = SparseValues(values.hessian, values.rhs_primal, more, 26, limits, values.lower, values.upper)
    one, two = (sparse.solve(each, Options()) for each in (values, again))
    assert one.status == two.status == Status.SOLVED
    np.testing.assert_allclose(two.primal, one.primal, atol=1e-10)
    g = np.random.default_rng(0).standard_normal(300)
    u = [each.face.kkt_solve(g, np.zeros(len(each.rows)), np.zeros(300))[0] for each in (one, two)]
    np.testing.assert_allclose(u[1], u[0], atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_products_and_factors_solve_the_same_face(seed: int) -> None:
    """The factored quasi-definite system is the second opinion of conjugate gradients."""
    values = projection(seed)
    face = sparse.solve(values, Options()).face
    rng = np.random.default_rng(seed)
    g, r = rng.standard_normal(300), rng.standard_normal(80) * face.rows
    bounds = rng.standard_normal(300)
    by_products = face.kkt_solve(g, r, bounds)
    matrix = SparseValues(
        compressed(sp.diags_array(values.hessian)), values.rhs_primal, values.rows, 20, values.rhs_rows, values.lower,
        values.upper,
    )  # fmt: skip
    by_factor = SparseFace(matrix, face.rows, face.bounds).kkt_solve(g, r, bounds)
    for ours, theirs in zip(by_products, by_factor, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
    u, w, pull = by_products
    np.testing.assert_allclose(u + values.rows.T @ w + pull, g, atol=1e-11)
    np.testing.assert_allclose((values.rows @ u - r)[face.rows], 0.0, atol=1e-11)
    np.testing.assert_array_equal(u[face.bounds != 0], bounds[face.bounds != 0])


def failing(kind: str) -> tuple[SparseValues, Status]:
    values = projection(3)
    n = values.num_variables
    if kind == "rows":
        rows = compressed(sp.vstack([values.rows, values.rows[[30]], -values.rows[[30]]]))
        rhs = np.concatenate([values.rhs_rows, [0.3, -0.4]])
        return SparseValues(values.hessian, values.rhs_primal, rows, 20, rhs, values.lower, values.upper), (
            Status.INFEASIBLE
        )
    if kind == "bounds":
        lower = values.lower.copy()
        lower[5] = 2.0
        return SparseValues(values.hessian, values.rhs_primal, values.rows, 20, values.rhs_rows, lower, values.upper), (
            Status.INFEASIBLE
        )
    if kind == "out of reach":
        rhs = values.rhs_rows.copy()
        rhs[40] = -100.0
        return SparseValues(values.hessian, values.rhs_primal, values.rows, 20, rhs, values.lower, values.upper), (
            Status.INFEASIBLE
        )
    if kind == "nan":
        linear = values.rhs_primal.copy()
        linear[7] = np.nan
        return SparseValues(values.hessian, linear, values.rows, 20, values.rhs_rows, values.lower, values.upper), (
            Status.INVALID_INPUT
        )
    if kind == "negative":
        hessian = values.hessian.copy()
        hessian[3] = -1.0
        return SparseValues(hessian, values.rhs_primal, values.rows, 20, values.rhs_rows, values.lower, values.upper), (
            Status.NOT_STRICTLY_CONVEX
        )
    free = np.full(n, np.inf)
    empty = compressed(sp.csr_array((0, n)))
    return SparseValues(np.zeros(n), values.rhs_primal, empty, 0, np.zeros(0), -free, free), Status.UNBOUNDED


@pytest.mark.parametrize("kind", ["rows", "bounds", "out of reach", "nan", "negative", "unbounded"])
def test_failures_say_what_they_are_and_prove_it(kind: str) -> None:
    values, wanted = failing(kind)
    found = sparse.solve(values, Options())
    assert found.status == wanted
    if wanted == Status.INFEASIBLE and kind != "bounds":
        y, z = found.rows, found.bounds
        assert np.all(y[values.num_equalities :] >= 0.0)
        scale = max(np.abs(y).max(), np.abs(z).max())
        np.testing.assert_allclose(values.rows.T @ y + z, 0.0, atol=1e-9 * scale)
        limits = np.where(z > 0.0, values.upper, values.lower)
        assert values.rhs_rows @ y + limits[z != 0.0] @ z[z != 0.0] < 0.0
    if wanted == Status.UNBOUNDED:
        assert found.ray is not None
        assert values.rhs_primal @ found.ray > 0.0


def test_the_optimum_of_least_norm_is_chosen_and_said_to_be_one_of_many() -> None:
    """min x_1 over {x_1 + x_2 = 1, x >= 0, x_3 in [-1, 2]}: x = (0, 1, 0)."""
    rows = compressed(np.array([[1.0, 1.0, 0.0]]))
    lower, upper = np.array([0.0, 0.0, -1.0]), np.array([np.inf, np.inf, 2.0])
    values = SparseValues(np.zeros(3), np.array([-1.0, 0.0, 0.0]), rows, 1, np.ones(1), lower, upper)
    found = sparse.solve(values, Options())
    assert found.status == Status.SOLVED
    assert found.non_unique
    np.testing.assert_allclose(found.primal, [0.0, 1.0, 0.0], atol=1e-9)
    u, w, _ = found.face.kkt_solve(np.array([0.0, 1.0, 1.0]), np.zeros(1), np.zeros(3))
    np.testing.assert_allclose(u, 0.0, atol=1e-9)
    np.testing.assert_allclose(w, [1.0], atol=1e-9)


def test_the_route_follows_size_and_density() -> None:
    rng = np.random.default_rng(0)

    def case(n: int, m: int, share: float) -> Case:
        rows = rng.standard_normal((1, m, n)) * (rng.random((m, n)) < share)
        nothing = np.zeros((1, m))
        return Case(np.eye(n)[None], np.zeros((1, n)), rows, nothing, 0, np.zeros((1, n)), nothing, np.zeros(1, bool))

    assert isinstance(prepare(case(50, 20, 0.1).program()), Plan)
    assert isinstance(prepare(case(1300, 300, 0.01).program()), SparsePlan)
    assert not SparsePlan(case(1300, 300, 0.3).program()).worthwhile
    sparse_plan = prepare(case(40, 20, 1.0).program(), "sparse")
    assert isinstance(sparse_plan, SparsePlan)
    assert sparse_plan.route.polyhedral
    assert "dual semismooth Newton" in str(sparse_plan.route)
