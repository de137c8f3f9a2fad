"""cvxpylayers: a solver for its layers, a faster layer of the same signature, and a switch for existing code.

Three ways in, from least to most speed:

- ``cvxpylayers.torch.CvxpyLayer(problem, parameters, variables, solver=HSBackend())``: the stock layer, our solver;
- :func:`enable` / :func:`enabled`: every stock layer that names no solver;
- :class:`CvxpyLayer`: same signature as the stock class, without its per-call overheads.

Linear and convex quadratic programs with linear constraints are ours. What else there is (cones that are not
polyhedral, geometric programs) goes back to diffcp, the default of cvxpylayers, and ``layer.explain()`` says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import torch
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch.cvxpylayer import CvxpyLayer as _StockLayer
from cvxpylayers.utils import parse_args as _parse

from hsbackend.adapters import _canonical
from hsbackend.adapters._conic import DIFFCP_OPTIONS, ConicProgram
from hsbackend.differentiate import Call, Layer, SolveFunction
from hsbackend.program import FloatArray
from hsbackend.route import Route, SolverName
from hsbackend.solvers.result import Options
from hsbackend.sparse_plan import prepare
from hsbackend.status import (
    InvalidOptionError,
    SolveError,
    Status,
    UnsupportedProblemError,
    failure_message,
)

_OPTIONS = ("tolerance", "jacobian", "on_failure")
_SOLVERS = ("families", "semismooth_newton", "active_set", "reference", "sparse")


class IgnoredOptionWarning(UserWarning):
    """A ``solver_args`` entry belongs to the default backend and has no effect on a problem hsbackend solves."""


@dataclass(frozen=True)
class _Settings:
    tolerance: float = 1e-9
    jacobian: Literal["active", "support"] = "active"
    on_failure: Literal["raise", "nan"] = "raise"

    def __post_init__(self) -> None:
        if not 0.0 < float(self.tolerance) < 1.0:
            raise InvalidOptionError(f"`tolerance` is {self.tolerance!r}, expected a number between 0 and 1.")
        for name, allowed in (("jacobian", ("active", "support")), ("on_failure", ("raise", "nan"))):
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed)
                raise InvalidOptionError(f"`{name}` is {getattr(self, name)!r}, expected {choices}.")

    def updated(self, solver_args: dict[str, Any]) -> tuple[_Settings, dict[str, Any]]:
        """Apply ``solver_args``; return what belongs to the default backend apart."""
        unknown = [key for key in solver_args if key not in _OPTIONS and key not in DIFFCP_OPTIONS]
        if unknown:
            raise InvalidOptionError(
                f"unknown solver_args {', '.join(map(repr, unknown))}, expected {', '.join(_OPTIONS)} "
                f"(or, for problems that go to diffcp: {', '.join(sorted(DIFFCP_OPTIONS))})."
            )
        own = {key: value for key, value in solver_args.items() if key in _OPTIONS}
        rest = {key: value for key, value in solver_args.items() if key not in _OPTIONS}
        return (replace(self, **own) if own else self), rest

    def core(self, needs_grad: bool) -> Options:
        return Options(float(self.tolerance), self.jacobian, keep_face=needs_grad)


class _HostState:
    """Everything :class:`HSBackend` keeps for one stock layer; travels as the layer's ``cone_dims``."""

    def __init__(self, ctx: Any, backend: HSBackend) -> None:
        canonical = _canonical.Canonical.read(ctx)
        self.dims = ctx.cone_dims
        self.values = _canonical.HostValues.of(canonical)
        self.sizes = (
            None if canonical.quadratic is None else canonical.quadratic.shape[0],
            canonical.num_variables + 1,
            canonical.rows.shape[0],
        )
        wanted = _canonical.outputs(ctx)
        returned = _canonical.returned_variables(canonical, wanted)
        duals = any(output.source == "multipliers" for output in wanted)
        names = _canonical.row_names(ctx, canonical)
        program = _canonical.build_program(canonical, self.values.maps, self.values.sizes, returned, names, duals)
        self.layer: Layer | None = None
        self.conic: ConicProgram | None = None
        self.num_rows = canonical.num_rows
        if isinstance(program, str):
            self.route = Route("diffcp", program)
        else:
            plan = prepare(program, backend.solver)
            self.route = plan.route
            if plan.route.polyhedral:
                # The stock layer recovers its variables itself: hand it the whole primal and all multipliers.
                n, m = canonical.num_variables, canonical.num_rows
                everything = [_canonical.Output("primal", np.arange(n, dtype=np.int64), (n,))]
                if program.num_rows == m:
                    everything.append(_canonical.Output("multipliers", np.arange(m, dtype=np.int64), (m,)))
                self.layer = Layer(plan, everything)
        if self.layer is None:
            if backend.fallback == "error":
                raise UnsupportedProblemError(_unsupported(self.route))
            self.conic = ConicProgram(canonical)

    def __getattr__(self, name: str) -> Any:
        """Look like the host's cone dimensions to anybody else."""
        if name.startswith("__") or name == "dims":
            raise AttributeError(name)
        return getattr(self.dims, name)


def _unsupported(route: Route) -> str:
    return (
        f"hsbackend cannot solve this problem: {route.reason}. Pass fallback='diffcp' to hand such problems to the "
        "default backend of cvxpylayers."
    )


class HSBackend(SolverInterface):
    """Solver for ``cvxpylayers.torch.CvxpyLayer(..., solver=HSBackend())`` and its JAX twin.

    Solves convex quadratic programs with linear constraints, linear programs among them,

        minimise 1/2 x'Qx + q'x   subject to   A x = b,  G x <= h,     Q positive semidefinite,

    recognised inside the canonical form, and differentiates them with the HS-Jacobian. Where there are several optima
    the one of least norm in the returned variables is returned, and ``non_unique`` says so. One instance may serve
    several layers.

    Args:
        tolerance: largest accepted KKT residual relative to the data, in (0, 1). The default 1e-9 is met with room by
            exact active-set solutions; an item above it has status ``NOT_CONVERGED``.
        jacobian: ``"active"`` uses every row at its limit (the choice of Yang, Gu, Yuan 2026), ``"support"`` only
            rows with a multiplier and passes more gradient at degenerate points.
        fallback: ``"diffcp"`` hands problems that are not polyhedral to the default backend, ``"error"`` raises.
        on_failure: ``"raise"`` raises :class:`hsbackend.SolveError` naming the failing items, ``"nan"`` returns NaN in
            those items only.
        solver: insist on ``"families"``, ``"semismooth_newton"``, ``"active_set"``, ``"sparse"`` or ``"reference"``;
            None chooses by structure.

    Attributes:
        routes: reports of the layers set up so far, oldest first.
        status: (B,) int8 tensor of :class:`hsbackend.Status` codes of the last solve, None before.
        non_unique: (B,) bool tensor, whether an item of the last solve has other optima than the one returned; None
            before, and where diffcp solved.

    Raises:
        InvalidOptionError: for an option outside its range.
        UnsupportedProblemError: at layer construction, with ``fallback="error"``.

    Notes:
        The stock layer evaluates and copies constant data on every call; :class:`CvxpyLayer` of this module does not.
    """

    canon_solver: _canonical.CanonicalForm = _canonical.QUADRATIC
    supports_quad_obj = True

    def __init__(
        self,
        tolerance: float = 1e-9,
        jacobian: Literal["active", "support"] = "active",
        fallback: Literal["diffcp", "error"] = "diffcp",
        on_failure: Literal["raise", "nan"] = "raise",
        solver: SolverName | None = None,
    ) -> None:
        """Check and keep the options."""
        self.settings = _Settings(tolerance, jacobian, on_failure)
        if fallback not in ("diffcp", "error"):
            raise InvalidOptionError(f"`fallback` is {fallback!r}, expected 'diffcp' or 'error'.")
        if solver is not None and solver not in _SOLVERS:
            raise InvalidOptionError(f"`solver` is {solver!r}, expected None or one of {', '.join(_SOLVERS)}.")
        self.fallback: Literal["diffcp", "error"] = fallback
        self.solver: SolverName | None = solver
        self.routes: list[Route] = []
        self.status: torch.Tensor | None = None
        self.non_unique: torch.Tensor | None = None

    @property
    def canon_solver_name(self) -> Any:
        """The solver cvxpy canonicalises for; it takes the object where it takes a name."""
        return self.canon_solver

    def conic_twin(self) -> HSBackend:
        """Return a backend with these options for problems that only the purely conic canonical form accepts."""
        twin = _ConicBackend(
            self.settings.tolerance, self.settings.jacobian, self.fallback, self.settings.on_failure, self.solver
        )
        twin.routes = self.routes
        return twin

    def explain(self) -> Route:
        """Return the routing report of the layer set up last (``routes`` has them all)."""
        if not self.routes:
            raise RuntimeError("no layer has been built with this backend yet")
        return self.routes[-1]

    def setup(self, ctx: Any) -> None:
        """Prepare one stock layer; called by the host."""
        state = _HostState(ctx, self)
        self.routes.append(state.route)
        # The dims object is the only thing of a layer that reaches a solve.
        ctx.cone_dims = state
        # The host's JAX layer talks to `solver_ctx` even when a solver object is given.
        ctx.solver_ctx = _JaxBridge(self, state)

    def _solve(
        self, state: _HostState, values: Sequence[FloatArray | None], solver_args: dict[str, Any], needs_grad: bool
    ) -> tuple[FloatArray, FloatArray, Any]:
        """Solve on NumPy values of P (or None), q and [C d], batch first."""
        settings, rest = self.settings.updated(solver_args)
        p, q, a = values
        assert q is not None
        assert a is not None
        if state.layer is None:
            assert state.conic is not None
            primal, dual, status, saved = state.conic.solve(p, q, a, rest)
            self._finish(status, None, {}, settings.on_failure)
            return primal, dual, saved
        _warn_ignored(rest)
        moving = state.values.moving
        parameters = [
            np.ascontiguousarray(source.T[index].T) if source is not None and len(index) else np.zeros((1, 0))
            for source, index in zip((p, q, a), moving, strict=True)
        ]
        call_options = settings.core(needs_grad)
        batch = q.shape[0]
        if all(array.shape[0] != batch for array in parameters) and batch != 1:  # nothing varies: solve once per item
            parameters[1] = np.zeros((batch, 0))
        solution = state.layer.plan.solve(parameters, call_options)
        self._finish(solution.status, solution.non_unique, state.layer.conflicts(solution), settings.on_failure)
        found = state.layer.select(solution)
        primal = found[0]
        dual = found[1] if len(found) > 1 else np.zeros((batch, state.num_rows))
        return primal, dual, solution

    def _finish(self, status: Any, non_unique: Any, conflicts: Mapping[int, Sequence[str]], on_failure: str) -> None:
        self.status = torch.from_numpy(np.array(status))
        self.non_unique = None if non_unique is None else torch.from_numpy(np.array(non_unique))
        if on_failure == "raise" and np.any(status != Status.SOLVED):
            raise SolveError(failure_message(status, conflicts), status)

    def _derivative(
        self, state: _HostState, saved: Any, grad_primal: FloatArray, grad_dual: FloatArray
    ) -> list[FloatArray | None]:
        """Return gradients of P, q and [C d]; None where nothing varies."""
        if state.layer is None:
            assert state.conic is not None
            return list(state.conic.derivative(grad_primal, grad_dual, saved))
        cotangents = [grad_primal, grad_dual][: len(state.layer.outputs)]
        wanted = [size > 0 for size in state.values.sizes]
        found = state.layer.pullback(saved, cotangents, wanted, [False] * 3)
        result: list[FloatArray | None] = []
        for value, index, size in zip(found, state.values.moving, state.sizes, strict=True):
            result.append(None if value is None or size is None else _canonical.scatter_columns(value, index, size))
        return result

    def solve_torch_batch(
        self, P: Any, q: Any, A: Any, dims: Any, solver_args: dict[str, Any], needs_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Solve a batch for the stock torch layer (signature of the host)."""
        state = _state_of(dims)
        values = [None if v is None else v.detach().to(device="cpu", dtype=torch.float64).numpy() for v in (P, q, A)]
        primal, dual, saved = self._solve(state, values, solver_args, needs_grad)
        like = {"device": q.device, "dtype": q.dtype}
        return torch.from_numpy(primal).to(**like), torch.from_numpy(dual).to(**like), (state, saved, like)

    def derivative_torch_batch(self, dprimal: Any, ddual: Any, saved_state: Any) -> tuple[Any, Any, Any]:
        """Differentiate for the stock torch layer (signature of the host)."""
        state, saved, like = saved_state
        grads = [g.to(device="cpu", dtype=torch.float64).contiguous().numpy() for g in (dprimal, ddual)]
        found = self._derivative(state, saved, *grads)
        p, q, a = (None if value is None else torch.from_numpy(value).to(**like) for value in found)
        return p, q, a

    def solve_jax_batch(
        self, P: Any, q: Any, A: Any, dims: Any, solver_args: dict[str, Any], needs_grad: bool
    ) -> tuple[Any, Any, Any]:
        """Solve a batch for JAX arrays (signature of the host)."""
        import jax.numpy as jnp

        state = _state_of(dims)
        values = [None if v is None else np.asarray(v, dtype=np.float64) for v in (P, q, A)]
        primal, dual, saved = self._solve(state, values, solver_args, needs_grad)
        return jnp.asarray(primal, dtype=q.dtype), jnp.asarray(dual, dtype=q.dtype), (state, saved, q.dtype)

    def derivative_jax_batch(self, dprimal: Any, ddual: Any, saved_state: Any) -> tuple[Any, Any, Any]:
        """Differentiate for JAX arrays (signature of the host)."""
        import jax.numpy as jnp

        state, saved, dtype = saved_state
        grads = [np.ascontiguousarray(np.asarray(g, dtype=np.float64)) for g in (dprimal, ddual)]
        found = self._derivative(state, saved, *grads)
        p, q, a = (None if value is None else jnp.asarray(value, dtype=dtype) for value in found)
        return p, q, a


class _ConicBackend(HSBackend):
    """The same solver behind the canonical form without quadratic objectives."""

    canon_solver = _canonical.CONIC
    supports_quad_obj = False


def _state_of(dims: Any) -> _HostState:
    if not isinstance(dims, _HostState):
        raise RuntimeError("HSBackend.setup(ctx) has not been called for this layer; the host calls it once per layer")
    return dims


class _JaxBridge:
    """Stands where the host's JAX layer expects the context of a built-in solver."""

    def __init__(self, backend: HSBackend, state: _HostState) -> None:
        self._backend = backend
        self._state = state

    def jax_to_data(self, quad_obj_values: Any, lin_obj_values: Any, con_values: Any) -> _JaxData:
        """Take the host's values, batch last."""
        return _JaxData(self._backend, self._state, quad_obj_values, lin_obj_values, con_values)


class _JaxData:
    """One call of the host's JAX layer."""

    def __init__(self, backend: HSBackend, state: _HostState, p: Any, q: Any, a: Any) -> None:
        self._backend, self._state = backend, state
        self._single = q.ndim == 1

        def batch_first(value: Any) -> Any:
            if value is None:
                return None
            return value[None] if self._single else value.T

        self._values = (batch_first(p), batch_first(q), batch_first(a))

    def jax_solve_only(self, solver_args: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Solve without keeping what a derivative needs."""
        p, q, a = self._values
        primal, dual, _ = self._backend.solve_jax_batch(p, q, a, self._state, solver_args or {}, False)
        return primal, dual

    def jax_solve(self, solver_args: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
        """Solve and keep what a derivative needs."""
        p, q, a = self._values
        return self._backend.solve_jax_batch(p, q, a, self._state, solver_args or {}, True)

    def jax_derivative(self, dprimal: Any, ddual: Any, saved: Any) -> tuple[Any, Any, Any]:
        """Differentiate; gradients have the shapes of the values."""
        import jax.numpy as jnp

        found = self._backend.derivative_jax_batch(dprimal, ddual, saved)
        result: list[Any] = []
        for value, gradient in zip(self._values, found, strict=True):
            if value is None:
                result.append(None)
                continue
            full = jnp.zeros_like(value) if gradient is None else gradient
            result.append(full[0] if self._single else full.T)
        return result[0], result[1], result[2]


def _warn_ignored(rest: dict[str, Any]) -> None:
    if rest:
        warnings.warn(
            f"solver_args {', '.join(sorted(rest))} belong to diffcp and have no effect: hsbackend solves this problem",
            IgnoredOptionWarning,
            stacklevel=4,
        )


class CvxpyLayer(_StockLayer):
    """Drop-in replacement of ``cvxpylayers.torch.CvxpyLayer`` that solves with hsbackend.

    Same arguments and results as the stock class; ``solver=None`` means hsbackend. Only data that depend on a
    parameter are evaluated, constant matrices are factored once, and the user's problem is left as it was.

    Args:
        problem: a DPP ``cvxpy.Problem``.
        parameters: its parameters, in the order of ``forward``'s arguments.
        variables: variables (or dual variables of constraints) to return.
        solver: None, an :class:`HSBackend` carrying options, or what the stock class accepts; an explicit other solver
            is used as asked.
        gp: geometric program; solved by the default backend.
        verbose: print the default backend's output.
        canon_backend: passed on to cvxpy.
        solver_args: defaults of ``forward``'s ``solver_args``: ``tolerance``, ``jacobian``, ``on_failure``, and
            diffcp's own for problems that go there.

    Attributes:
        status: (B,) int8 tensor of :class:`hsbackend.Status` codes of the last call (B = 1 without a batch), or None.
        non_unique: (B,) bool tensor, whether an item of the last call has optima besides the least-norm one returned;
            None where hsbackend did not solve the problem.

    Raises:
        UnsupportedProblemError: for ``HSBackend(fallback="error")`` and a problem hsbackend cannot solve.
        SolveError: from ``forward`` when an item has no solution and ``on_failure="raise"``.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: list[cp.Parameter],
        variables: list[cp.Variable],
        solver: Any = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        """Canonicalise, route, factor what is constant."""
        torch.nn.Module.__init__(self)
        self.non_unique: torch.Tensor | None = None
        self.status: torch.Tensor | None = None
        self._stock: _StockLayer | None = None
        self._layer: Layer | None = None
        self._warm: Any = None
        backend = HSBackend() if solver is None else solver
        # Canonicalising caches inside the problem and other layers permute what is cached: work on a copy that shares
        # the expressions, so that the user's problem stays as it was.
        problem = cp.Problem(problem.objective, problem.constraints)
        arguments = {"gp": gp, "verbose": verbose, "canon_backend": canon_backend}
        self._solver_args = dict(solver_args or {})
        if not isinstance(backend, HSBackend):
            self._settings, self._rest = _Settings(), {}
            self._route = Route("diffcp", f"solver {solver!r} was requested")
            self._stock = _StockLayer(
                problem, parameters, variables, solver=backend, solver_args=self._solver_args, **arguments
            )
            self._keep(self._stock.ctx)
            return
        self._settings, self._rest = backend.settings.updated(self._solver_args)
        self._route = self._build(problem, parameters, variables, backend, arguments)
        if self._stock is None:
            backend.routes.append(self._route)
            _warn_ignored(self._rest)

    def _keep(self, ctx: Any) -> None:
        self.ctx = ctx
        self._shapes = [tuple(int(size) for size in parameter.shape) for parameter in ctx.parameters]

    def _build(
        self, problem: cp.Problem, parameters: Any, variables: Any, backend: HSBackend, arguments: dict[str, Any]
    ) -> Route:
        """Prepare our solver, or the stock layer where the problem is not ours; say which and why."""
        if arguments["gp"]:
            return self._delegate(problem, parameters, variables, backend, arguments, "geometric program")
        if not _canonical.is_dpp(problem):
            rewritten = _canonical.name_quad_form_arguments(problem)
            if _canonical.is_dpp(rewritten):
                problem = rewritten
            elif problem.is_dpp():  # only the purely conic canonical form accepts the parameter's place
                reason = (
                    "a parameter inside a quadratic form that is in a constraint or of an argument that is not affine"
                )
                return self._delegate(problem, parameters, variables, backend.conic_twin(), arguments, reason)
        ctx = _parse.parse_args(
            problem, variables, parameters, None, verbose=arguments["verbose"],
            canon_backend=arguments["canon_backend"], solver_args={}, custom_solver=backend,
        )  # fmt: skip
        canonical = _canonical.Canonical.read(ctx)
        parametrisation = _canonical.Parametrisation.of_user(ctx)
        wanted = _canonical.outputs(ctx)
        program = _canonical.build_program(
            canonical,
            _canonical.user_maps(canonical, parametrisation),
            parametrisation.sizes,
            _canonical.returned_variables(canonical, wanted),
            _canonical.row_names(ctx, canonical),
            any(output.source == "multipliers" for output in wanted),
        )
        plan = None if isinstance(program, str) else prepare(program, backend.solver)
        if plan is None or not plan.route.polyhedral:
            return self._delegate(problem, parameters, variables, backend, arguments, None)
        self._keep(ctx)
        self._layer = Layer(plan, wanted)
        return plan.route

    def _delegate(
        self, problem: cp.Problem, parameters: Any, variables: Any, backend: HSBackend, arguments: dict[str, Any],
        reason: str | None,
    ) -> Route:  # fmt: skip
        """Build the stock layer with our solver, whose way for what is not polyhedral is diffcp."""
        if reason is not None and backend.fallback == "error":
            raise UnsupportedProblemError(_unsupported(Route("diffcp", reason)))
        self._stock = _StockLayer(problem, parameters, variables, solver=backend, **arguments)
        self._keep(self._stock.ctx)
        route = backend.routes[-1]
        return route if reason is None else replace(route, reason=f"{reason} ({route.reason})")

    def explain(self) -> Route:
        """Return the routing report; ``print`` it."""
        return self._route

    def forward(
        self, *params: torch.Tensor, solver_args: dict[str, Any] | None = None, warm_start: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Solve for parameter values and return the variables.

        Args:
            params: one floating tensor per parameter, of its shape or with one batch dimension in front; parameters
                without it are shared by the batch, and their gradient is the sum over the items.
            solver_args: override the constructor's for this call.
            warm_start: start from the previous call, item by item when the batch size is the same and from the nearest
                item otherwise; changes the
                time, not the answer.

        Returns:
            One tensor per variable, ``(B, *shape)``, or ``shape`` when no parameter has a batch dimension; the
            dtype is the promoted dtype of the parameters. Differentiable once.

        Raises:
            ValueError: for a wrong number or shape of parameters.
            TypeError: for a parameter that is not floating.
            SolveError: when an item has no solution and ``on_failure="raise"``.
        """
        settings, rest = self._settings.updated(solver_args or {})
        self.non_unique = None
        stock = self._stock
        if stock is not None and not isinstance(stock.ctx.solver, HSBackend):
            self.status = None
            return stock(*params, solver_args={**self._solver_args, **(solver_args or {})}, warm_start=warm_start)
        batched, batch, dtype = self._check(params)
        if batch == 0:
            self.status = torch.zeros(0, dtype=torch.int8)
            nothing = sum((p.sum() * 0 for p in params), torch.zeros((), dtype=dtype))
            return tuple(nothing + torch.zeros((0, *record.shape), dtype=dtype) for record in self.ctx.var_recover)
        if self._layer is None:
            assert stock is not None
            return self._forward_stock(stock, params, dtype, settings, {**self._rest, **rest})
        _warn_ignored(rest)
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in params)
        options = replace(settings.core(needs_grad or warm_start), keep_warm=warm_start)
        call = Call(options, settings.on_failure, self._warm if warm_start else None)
        try:
            found = SolveFunction.apply(self._layer, call, batched, dtype, *params)
        except SolveError as error:
            self.status = torch.from_numpy(error.status)
            raise
        assert call.solution is not None
        self.status = torch.from_numpy(call.solution.status)
        self.non_unique = torch.from_numpy(call.solution.non_unique)
        if warm_start:
            self._warm = call.solution.warm
        if any(batched):
            return tuple(found)
        return tuple(value[0] for value in found)

    def _forward_stock(
        self,
        stock: _StockLayer,
        params: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        settings: _Settings,
        rest: dict[str, Any],
    ) -> tuple[torch.Tensor, ...]:
        own = {name: getattr(settings, name) for name in _OPTIONS}
        try:
            return tuple(value.to(dtype) for value in stock(*params, solver_args={**rest, **own}))
        finally:
            self.status = stock.ctx.solver.status
            self.non_unique = stock.ctx.solver.non_unique

    def _check(self, params: Sequence[torch.Tensor]) -> tuple[tuple[bool, ...], int, torch.dtype]:
        """Check number, dtypes and shapes; return which parameters are batched, the batch size and the dtype."""
        shapes = self._shapes
        if len(params) != len(shapes):
            raise ValueError(
                f"A tensor must be provided for each CVXPY parameter; received {len(params)} tensors, "
                f"expected {len(shapes)}."
            )
        batched: list[bool] = []
        sizes: dict[int, int] = {}
        dtype: torch.dtype | None = None
        for index, (value, shape) in enumerate(zip(params, shapes, strict=True)):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(
                    f"Invalid dtype for parameter {index}. Expected a floating point tensor, got {kind}. "
                    "Convert it with .to(torch.float64)."
                )
            given = tuple(value.shape)
            if given == shape:
                batched.append(False)
            elif given[1:] == shape and len(given) == len(shape) + 1:
                batched.append(True)
                sizes[index] = given[0]
            else:
                raise ValueError(
                    f"Invalid parameter shape for parameter {index}. Expected: {shape}, or with a batch dimension "
                    f"(batch_size, {', '.join(map(str, shape))}), Got: {given}."
                )
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "Inconsistent batch sizes. Expected all batched parameters to have the same batch size, got "
                + ", ".join(f"{size} for parameter {index}" for index, size in sizes.items())
                + "."
            )
        batch = next(iter(sizes.values()), 1)
        return tuple(batched), batch, dtype or torch.get_default_dtype()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Accept checkpoints of the stock layer, which keeps its constant maps as buffers."""
        if self._stock is None:
            for name in ("P", "q", "A"):
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the warm start and the last status out of copies and pickles."""
        return {**self.__dict__, "_warm": None, "status": None, "non_unique": None}


_stock_init = _StockLayer.__init__


def _init_with_hsbackend(self: Any, *args: Any, **kwargs: Any) -> None:
    """Replace the stock constructor: a layer that names no solver becomes ours."""
    names = ("problem", "parameters", "variables", "solver")
    solver = kwargs.get("solver", args[3] if len(args) > 3 else None)
    if solver is not None or isinstance(self, CvxpyLayer):
        _stock_init(self, *args, **kwargs)
        return
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if type(self) is _StockLayer and len(args) <= len(names):
        self.__class__ = CvxpyLayer
        self.__init__(**arguments)
    elif arguments.get("gp") or len(args) > len(names):
        _stock_init(self, *args, **kwargs)
    else:  # a user's subclass keeps its own forward, with our solver underneath
        arguments["solver"] = HSBackend()
        _stock_init(self, **arguments)


def enable() -> None:
    """Route every ``cvxpylayers.torch.CvxpyLayer`` built from now on that names no solver through hsbackend.

    Works for code that imported the class earlier. Layers that exist already do not change.
    """
    _StockLayer.__init__ = _init_with_hsbackend  # type: ignore[method-assign]


def disable() -> None:
    """Undo :func:`enable`."""
    _StockLayer.__init__ = _stock_init  # type: ignore[method-assign]


@contextmanager
def enabled() -> Iterator[None]:
    """Apply :func:`enable` inside a ``with`` block and restore what was before at its end."""
    before = _StockLayer.__init__
    enable()
    try:
        yield
    finally:
        _StockLayer.__init__ = before  # type: ignore[method-assign]
