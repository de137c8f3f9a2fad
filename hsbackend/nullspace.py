"""Train under equality constraints by the null-space method, for parameters of any number, by products alone.

    min_theta L(theta)   subject to   c(theta) = 0,      J = dc/dtheta,   g = dL/dtheta

The step is the gradient, minus what of it would change c to first order, plus the shortest step that shrinks c:

    d = g - J^+ (J g - gamma c)  =  (I - J^+ J) g + gamma J^+ c,          theta <- theta - eta d                 (1)

with ``J^+ r`` by :func:`hsbackend.lstsq`, J by ``torch.func.jvp`` and J' by ``torch.func.vjp``. J is never formed.
Where ``J J^+ c = c`` this gives ``J d = gamma c``: to first order c shrinks by ``1 - eta gamma`` in each step, and for
a linear c exactly. If ``d = 0`` then ``c = 0`` and ``g = J' lambda`` with ``lambda = (J^+)' g``: the KKT conditions.

In a metric, ``D = diag(1/(sqrt(v) + eps))`` of Adam with its averages m of g and v of g^2, the shortest step is meant
in the norm of ``D^-1``:

    d = D m - D^1/2 (J D^1/2)^+ (J D m - gamma c)                                                                (2)

Then ``d = 0`` means ``c = 0`` and ``m = J' lambda`` again. To let Adam make a step of g and project that Euclideanly is
not the same: it stops where ``D m = J' lambda``, which is not a KKT point, and it is therefore not offered.

Source: Yamashita, "A differential equation approach to nonlinear programming" (1980), for the flow behind (1); Roy,
Hauberg and Kraemer, "Matrix-free least squares solvers" (2025), for doing it in networks by matrix-free least squares.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hsbackend.least_squares import StopReason, lstsq
from hsbackend.status import InvalidOptionError, SolveError, Status

__all__ = ["NullSpaceAdam", "ProjectionReport", "ProjectionWarning", "project_gradient", "ramp"]

#: A number, None where the constraint does not act, or a function of the step (from 0) that returns one of these.
Gamma = float | None | Callable[[int], float | None]
#: What is differentiated: a module, its parameters with or without names, or one tensor.
Parameters = torch.nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Any]
OnFailure = Literal["warn", "raise"]
#: How products with J are taken: in forward mode, or by transposing the recorded reverse mode.
Mode = Literal["forward", "reverse"]
_Leaves = list[Tensor]
_Product = Callable[[Tensor], Tensor]


class ProjectionWarning(UserWarning):
    """The least-squares problem of a step was not solved to its tolerances: ``J d = gamma c`` does not hold."""


@dataclass(frozen=True)
class ProjectionReport:
    """What one projection did. Norms are Euclidean over all entries.

    Attributes:
        gamma: of this step; None if the constraint did not act.
        norm_constraint: ``|c|`` before the step.
        norm_residual: ``|J d - gamma c|``, from a product with d as it is used; NaN if the constraint did not act.
        norm_gradient: of what was projected: ``|g|``, or ``|D m|`` with a metric.
        norm_projected: ``|d|``.
        norm_target: ``|J g - gamma c|`` (with a metric ``|J D m - gamma c|``), what the residual is relative to.
        stop_reason: of the solve, see :class:`hsbackend.least_squares.StopReason`; None if there was none.
        iterations: of the solve.
        condition: its estimate of the condition of J (scaled as it was solved), from below.
        products: with J, all of this step, those that check included.
        transposed_products: with J', each one reverse pass.
    """

    gamma: float | None
    norm_constraint: float
    norm_residual: float
    norm_gradient: float
    norm_projected: float
    norm_target: float
    stop_reason: StopReason | None
    iterations: int
    condition: float
    products: int
    transposed_products: int

    @property
    def acted(self) -> bool:
        """Whether the constraint acted in this step."""
        return self.gamma is not None

    @property
    def converged(self) -> bool:
        """Whether the least-squares problem was solved to its tolerances; yes if there was none."""
        return self.stop_reason is None or self.stop_reason.converged


def ramp(gamma: float, *, start: int = 0, length: int = 0) -> Callable[[int], float | None]:
    """Return a schedule for ``gamma``: nothing before ``start``, then a linear rise over ``length`` steps.

    Args:
        gamma: the final value, not negative.
        start: steps of warm-up in which the constraint does not act.
        length: steps of the rise; step ``start + k`` has ``gamma (k + 1) / (length + 1)``. 0 for none.

    Returns:
        A function of the step, counted from 0.

    Raises:
        ValueError: for negative numbers.
    """
    _check_gamma(gamma)
    for name, value in (("start", start), ("length", length)):
        if value != int(value) or value < 0:
            raise ValueError(f"{name}={value!r}, expected a number of steps, 0 or more")

    def schedule(step: int) -> float | None:
        return None if step < start else gamma * min((step - start + 1) / (length + 1), 1.0)

    return schedule


@dataclass(frozen=True)
class _Solver:
    """How the least-squares problem of a step is solved; see :func:`project_gradient`."""

    mode: Mode
    damp: float
    equilibrate: int
    atol: float | None
    btol: float | None
    max_steps: int
    on_failure: OnFailure

    def __post_init__(self) -> None:
        if self.mode not in ("forward", "reverse"):
            raise InvalidOptionError(f"mode={self.mode!r} is unknown, expected 'forward' or 'reverse'")
        if self.on_failure not in ("warn", "raise"):
            raise InvalidOptionError(f"on_failure={self.on_failure!r} is unknown, expected 'warn' or 'raise'")
        if self.equilibrate != int(self.equilibrate) or self.equilibrate < 0:
            raise ValueError(f"equilibrate={self.equilibrate!r}, expected a number of probes, 0 or more")
        if self.max_steps != int(self.max_steps) or self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps!r}, expected a positive integer")
        if not 0.0 <= self.damp < math.inf:
            raise ValueError(f"damp={self.damp!r}, expected a finite number that is not negative")


def project_gradient(
    params: Parameters,
    constraint: Callable[[Any], Any],
    gamma: Gamma,
    *,
    step: int | None = None,
    mode: Mode = "forward",
    damp: float = 0.0,
    equilibrate: int = 0,
    atol: float | None = None,
    btol: float | None = None,
    max_steps: int = 500,
    on_failure: OnFailure = "warn",
) -> ProjectionReport:
    """Replace the gradients of parameters by the null-space step of an equality constraint ``c(theta) = 0``.

        d = g - J^+ (J g - gamma c),          J = dc/dtheta by products, never formed

    Call it between ``backward()`` and the step of any optimiser. A step ``theta - eta d`` shrinks c by ``1 - eta
    gamma`` to first order, and where ``d = 0`` the KKT conditions hold. Optimisers that rescale entries (Adam after
    the projection) stop at the same points, but the rate at which c shrinks is then theirs; :class:`NullSpaceAdam`
    keeps ``J d = gamma c``.

    Args:
        params: theta: an ``nn.Module``; a mapping or an iterable of names and tensors; an iterable of tensors; or one
            tensor. All of one dtype, float32 or float64, on one device. Those with ``requires_grad=False`` are
            constants. A ``.grad`` of None counts as zero and is set.
        constraint: c, a function of torch operations without side effects. Its argument is what ``params`` was: for a
            module or for names a dict (for ``torch.func.functional_call``), for tensors a tuple, for a tensor a tensor.
            It holds all parameters, constants included. It returns a tensor or a tree of tensors of theta's dtype.
        gamma: how fast c shrinks, not negative, at most ``1/eta`` for a step ``eta`` that is not to overshoot. 0 keeps
            c as it is, to first order. None: the constraint does not act, the gradients stay. Or a function of the
            step that returns one of these, for instance :func:`ramp`.
        step: what ``gamma`` is called with.
        mode: how products with J are taken. ``"forward"``: a pass through c by ``torch.func.jvp`` each, with no memory
            of its own. ``"reverse"``: the reverse pass is recorded once and transposed; products then run neither c
            nor Python, several times faster where c is many small operations. It keeps that record, and c must be
            twice differentiable in reverse mode, with no need of forward mode.
        damp: lambda of the least-squares problem, not its square. With damping ``J d = gamma c`` holds less and
            less well, and the step stays short where J is badly conditioned.
        equilibrate: estimate the norms of the rows of J by so many products with random signs, and divide the rows by
            them. It takes fewer iterations where rows differ in size, exactly one probe where J has one entry per row;
            the solution changes only where c is inconsistent (weighted least squares) or with ``damp``.
        atol: of :func:`hsbackend.lstsq`.
        btol: of :func:`hsbackend.lstsq`.
        max_steps: most iterations.
        on_failure: ``"warn"`` for a :class:`ProjectionWarning` when the solve ends early, with d as far as it came;
            ``"raise"`` for an error, with the gradients as they were.

    Returns:
        Norms, products and the stop reason, see :class:`ProjectionReport`.

    Raises:
        SolveError: if the gradient, c or a product with J holds NaN or infinity, and with ``on_failure="raise"`` when
            the solve does not converge. The gradients are then untouched.
        TypeError: for parameters or constraints of other or mixed dtypes, and for sparse gradients.
        ValueError: for options out of range, no trainable parameters, or a schedule without ``step``.
        InvalidOptionError: for an unknown ``mode`` or ``on_failure``.

    Warns:
        ProjectionWarning: see ``on_failure``.

    Notes:
        Cost: one evaluation of c with its graph, then per iteration a product with J and one with J' (a reverse pass),
        and three more with J; memory about eight vectors like theta and three like c besides the graph.

        Rank-deficient J: nothing special happens. With dependent rows that agree, d is the same as without the
        repetition. If ``gamma c`` is not in the range of J (rows that contradict each other, or a point where J
        vanishes), d is the least-squares compromise: ``norm_residual`` of the report stays large relative to
        ``norm_target`` and ``stop_reason`` says that the normal equations hold, not the equations. c then shrinks
        only in the range of J, and with a minibatch constraint only for that minibatch.

    Source: see :mod:`hsbackend.nullspace`.
    """
    solver = _Solver(mode, damp, equilibrate, atol, btol, max_steps, on_failure)
    tensors, build = _read_parameters(params)
    problem = _Constraint(constraint, tensors, build)
    gradient = problem.flatten([_gradient_of(tensor) for tensor in problem.trainable])
    d, report = _project(problem, gradient, None, _gamma_at(gamma, step), solver)
    if report.acted:
        for tensor, leaf in zip(problem.trainable, problem.unflatten(d), strict=True):
            tensor.grad = leaf
    return report


class NullSpaceAdam(torch.optim.Optimizer):
    """Adam under an equality constraint ``c(theta) = 0``: the null-space step in Adam's own metric.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   D = diag(1 / (sqrt(v) + eps))
        d = D m - D^1/2 (J D^1/2)^+ (J D m - gamma c),                    theta <- theta - lr d

    with m and v corrected for their start as in Adam. ``J d = gamma c``, so that c shrinks by ``1 - lr gamma`` per
    step to first order; at a fixed point the KKT conditions hold. Without a constraint that acts this is Adam.

    Args:
        params: as for any optimiser: tensors, dicts of parameter groups, or names and tensors (for a module
            ``model.named_parameters()``); or the module itself.
        constraint: c, as for :func:`project_gradient`. Its argument is a dict where the parameters have names, else a
            tuple in the order of the groups.
        gamma: as for :func:`project_gradient`; a function is called with the number of steps done so far. ``lr gamma``
            has to be below 2, and 1 is a full step towards ``c = 0``.
        lr: learning rate. With groups of different rates the largest one is meant by ``lr`` above; the others, relative
            to it, are factors of D.
        betas: of the averages.
        eps: bounds the metric. Parameters the loss does not depend on have ``D = 1/eps`` and take nearly all of the
            correction of c; choose it larger, for instance 1e-4, where that is not wanted or where the solve takes
            many iterations.
        weight_decay: w of a decoupled decay, ``D m + w theta`` in place of ``D m``: it does not act against c.
        mode: as for :func:`project_gradient`.
        damp: as for :func:`project_gradient`.
        equilibrate: as for :func:`project_gradient`; D makes the rows of J differ in size, so that a few probes often
            pay.
        atol: of :func:`hsbackend.lstsq`.
        btol: of :func:`hsbackend.lstsq`.
        max_steps: most iterations of one solve.
        on_failure: as for :func:`project_gradient`. With ``"raise"`` theta is untouched; the averages have taken g.

    Attributes:
        report: :class:`ProjectionReport` of the last step, None before the first.

    Raises:
        SolveError: in ``step``, as :func:`project_gradient` does. For NaN in g or c the averages are untouched, too.
        TypeError: as :func:`project_gradient`.
        ValueError: for options out of range, and in ``step`` if ``lr gamma`` is 2 or more.
        InvalidOptionError: for an unknown ``mode`` or ``on_failure``.

    Warns:
        ProjectionWarning: when the solve of a step ends early.

    Notes:
        A gradient of None counts as zero. ``state_dict`` holds the averages and the number of steps; constraint and
        schedule are code, and are given anew. Cost and memory: as :func:`project_gradient`, and the two averages and
        D^1/2. What happens where J is rank deficient is said there.

    Source: see :mod:`hsbackend.nullspace`; Kingma and Ba, "Adam" (2015); Loshchilov and Hutter (2019) for the decay.
    """

    def __init__(
        self,
        params: Parameters,
        constraint: Callable[[Any], Any],
        *,
        gamma: Gamma = 1.0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: Mode = "forward",
        damp: float = 0.0,
        equilibrate: int = 0,
        atol: float | None = None,
        btol: float | None = None,
        max_steps: int = 500,
        on_failure: OnFailure = "warn",
    ) -> None:
        """Check the options and register the parameters."""
        if not callable(gamma) and gamma is not None:
            _check_gamma(gamma)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}, expected a finite number that is not negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas!r}, expected two numbers in [0, 1)")
        self._solver = _Solver(mode, damp, equilibrate, atol, btol, max_steps, on_failure)
        self._constraint = constraint
        self._gamma = gamma
        self.report: ProjectionReport | None = None
        if isinstance(params, torch.nn.Module):
            params = params.named_parameters()
        elif isinstance(params, Mapping):
            params = params.items()
        elif isinstance(params, Tensor):
            raise TypeError("`params` is a tensor, expected an iterable: give [tensor]")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @property
    def steps(self) -> int:
        """How many steps have been done."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do one step.

        Args:
            closure: evaluates the loss and its gradient again, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        problem = self._problem()
        gradients = [_gradient_of(tensor) for tensor in problem.trainable]
        # Before the averages have taken anything.
        _check_finite("the gradient", max(_norm(gradient) for gradient in gradients))
        gamma = _gamma_at(self._gamma, self.steps)
        rate = max(float(group["lr"]) for group in self.param_groups)
        linear = None
        if gamma is not None:
            if rate * gamma >= 2.0:
                raise ValueError(
                    f"lr * gamma = {rate:g} * {gamma:g}, expected below 2: c would grow by |1 - lr gamma| per step; "
                    f"take gamma <= {1.0 / rate:g}"
                )
            linear = problem.linearise(self._solver.mode)
        direction, roots = self._adam(problem, gradients, rate)
        d, self.report = _project(problem, direction, roots, gamma, self._solver, linear)
        for tensor, leaf in zip(problem.trainable, problem.unflatten(d), strict=True):
            tensor.add_(leaf, alpha=-rate)
        return loss

    def _problem(self) -> _Constraint:
        """Return the constraint at the parameters of all groups."""
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if names:
            return _Constraint(self._constraint, tensors, lambda leaves: dict(zip(names, leaves, strict=True)))
        return _Constraint(self._constraint, tensors, tuple)

    def _adam(self, problem: _Constraint, gradients: _Leaves, rate: float) -> tuple[Tensor, Tensor]:
        """Update the averages; return ``D m + w theta`` and ``D^1/2`` as vectors."""
        given = {id(tensor): gradient for tensor, gradient in zip(problem.trainable, gradients, strict=True)}
        direction: _Leaves = []
        roots: _Leaves = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            share = float(group["lr"]) / rate if rate else 1.0
            for tensor in group["params"]:
                if id(tensor) not in given:
                    continue
                gradient, state = given[id(tensor)], self.state[tensor]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(tensor)
                    state["exp_avg_sq"] = torch.zeros_like(tensor)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(gradient, 1.0 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
                metric = (v / (1.0 - beta2 ** state["step"])).sqrt_().add_(group["eps"]).reciprocal_().mul_(share)
                leaf = (metric * m).div_(1.0 - beta1 ** state["step"])
                if group["weight_decay"]:
                    leaf.add_(tensor, alpha=share * group["weight_decay"])
                direction.append(leaf)
                roots.append(metric.sqrt_())
        return problem.flatten(direction), problem.flatten(roots)


class _Linear(NamedTuple):
    """c (m,) at a point, its norm, and the products with J and J'."""

    c: Tensor
    norm: float
    matvec: _Product
    vecmat: _Product


class _Constraint:
    """c as a function of one flat vector, the trainable parameters side by side, and its derivative.

    Attributes:
        trainable: the parameters that require a gradient.
        point: their values as one vector.
    """

    def __init__(
        self, constraint: Callable[[Any], Any], tensors: Sequence[Tensor], build: Callable[[_Leaves], Any]
    ) -> None:
        """Check dtypes and devices."""
        if not callable(constraint):
            raise TypeError(f"`constraint` is a {type(constraint).__name__}, expected a function of the parameters")
        self.trainable = [tensor for tensor in tensors if tensor.requires_grad]
        if not self.trainable:
            raise ValueError("no parameter requires a gradient, expected at least one")
        first = self.trainable[0]
        if first.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the parameters are {first.dtype}, expected float32 or float64 (keep a master copy)")
        for tensor in self.trainable:
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise TypeError(
                    f"parameters are {first.dtype} on {first.device} and {tensor.dtype} on {tensor.device}, expected "
                    "one dtype and one device"
                )
        self.point = self.flatten(self.trainable)
        self._constraint = constraint
        self._build = build
        self._given = [None if tensor.requires_grad else tensor.detach() for tensor in tensors]

    def flatten(self, leaves: Sequence[Tensor]) -> Tensor:
        """Lay leaves like the trainable parameters side by side."""
        return torch.cat([leaf.detach().reshape(-1) for leaf in leaves])

    def unflatten(self, vector: Tensor) -> _Leaves:
        """Return views of the parts."""
        parts = vector.split([tensor.numel() for tensor in self.trainable])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, self.trainable, strict=True)]

    def __call__(self, theta: Tensor) -> Tensor:
        """Return c as a vector.

        Raises:
            TypeError: if it holds no tensor, or one of another dtype or device than the parameters.
        """
        rest = iter(self.unflatten(theta))
        value = self._constraint(self._build([next(rest) if given is None else given for given in self._given]))
        leaves = pytree.tree_leaves(value)
        if not leaves:
            raise TypeError("`constraint` returned no tensor, expected a tensor or a tree of tensors")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"`constraint` returned a {type(leaf).__name__}, expected a tensor or a tree of tensors"
                )
            if leaf.dtype != theta.dtype or leaf.device != theta.device:
                raise TypeError(
                    f"`constraint` returned {leaf.dtype} on {leaf.device}, expected {theta.dtype} on {theta.device} "
                    "as the parameters"
                )
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def value(self) -> Tensor:
        """Return c."""
        with torch.no_grad():
            return self(self.point)

    def linearise(self, mode: Mode) -> _Linear:
        """Return c and the products with J and J'.

        Raises:
            SolveError: if c holds NaN or infinity.
        """
        c, matvec, vecmat = self._recorded() if mode == "reverse" else self._pushed()
        norm = _norm(c)
        _check_finite("the constraint", norm)
        return _Linear(c, norm, matvec, vecmat)

    def _pushed(self) -> tuple[Tensor, _Product, _Product]:
        """Push every x through c."""
        c, pull = torch.func.vjp(self, self.point)[:2]

        def matvec(x: Tensor) -> Tensor:
            # Torch 2.13 returns float64 tangents of a float32 tensor without axes minus a number.
            return torch.func.jvp(self, (self.point,), (x,))[1].to(c.dtype)

        return c, matvec, lambda y: pull(y)[0]

    def _recorded(self) -> tuple[Tensor, _Product, _Product]:
        """Record c and ``y -> J'y``; both are transposed as often as asked for."""
        with torch.enable_grad():
            theta = self.point.detach().requires_grad_()
            c = self(theta)
            if not c.requires_grad:  # A constant.
                return c, lambda x: torch.zeros_like(c), lambda y: torch.zeros_like(theta)
            y = torch.zeros_like(c, requires_grad=True)
            (pulled,) = torch.autograd.grad(c, theta, y, create_graph=True)

        def matvec(x: Tensor) -> Tensor:
            return torch.autograd.grad(pulled, y, x, retain_graph=True)[0].detach()

        def vecmat(y: Tensor) -> Tensor:
            return torch.autograd.grad(c, theta, y, retain_graph=True)[0].detach()

        return c.detach(), matvec, vecmat


def _project(
    problem: _Constraint, target: Tensor, roots: Tensor | None, gamma: float | None, solver: _Solver,
    linear: _Linear | None = None,
) -> tuple[Tensor, ProjectionReport]:  # fmt: skip
    """Return d of (2), or of (1) without ``roots``, and the report; the target itself if the constraint does not act.

    Args:
        problem: c.
        target: g, or ``D m``.
        roots: ``D^1/2``.
        gamma: of this step.
        solver: options.
        linear: c and its products, if they have been taken already.
    """
    with torch.no_grad():
        norm_target = _norm(target)
        _check_finite("the gradient", norm_target)
        if gamma is None:
            norm_c, nan = _norm(problem.value()), math.nan
            return target, ProjectionReport(None, norm_c, nan, norm_target, norm_target, nan, None, 0, nan, 0, 0)
        c, norm_c, matvec, vecmat = problem.linearise(solver.mode) if linear is None else linear
        wanted = matvec(target).sub_(c, alpha=gamma)
        norm_wanted = _norm(wanted)
        _check_finite("a product with J", norm_wanted)

        forward, backward = matvec, vecmat
        if roots is not None:
            forward, backward = (lambda x: matvec(roots * x)), (lambda y: vecmat(y).mul_(roots))
        weights = _row_weights(forward, target, c, solver.equilibrate)
        products = forward, backward
        if weights is not None:
            products = (lambda x: forward(x).mul_(weights), lambda y: backward(weights * y))
        found = lstsq(
            products,
            wanted if weights is None else weights * wanted,  # pyright: ignore[reportCallIssue]
            x_like=target,
            damp=solver.damp,
            atol=solver.atol,
            btol=solver.btol,
            max_steps=solver.max_steps,
            on_failure="keep",
        )
        reason = StopReason(int(found.stop_reason))
        if reason == StopReason.INVALID_INPUT:
            raise SolveError("a product with J holds NaN or infinity", _code(Status.INVALID_INPUT))
        if not reason.converged:
            _report_failure(reason, int(found.iterations), solver)
        d = target - (found.x if roots is None else roots * found.x)
        return d, ProjectionReport(
            gamma=gamma, norm_constraint=norm_c, norm_residual=_norm(matvec(d).sub_(c, alpha=gamma)),
            norm_gradient=norm_target, norm_projected=_norm(d), norm_target=norm_wanted, stop_reason=reason,
            iterations=int(found.iterations), condition=float(found.condition),
            products=int(found.products) + 2 + solver.equilibrate,
            transposed_products=int(found.transposed_products),
        )  # fmt: skip


def _row_weights(matvec: Callable[[Tensor], Tensor], like: Tensor, c: Tensor, probes: int) -> Tensor | None:
    """Return one over the estimated norms of the rows of J, like c; None for no probes, or if J vanishes.

    For random signs z the expectation of ``(J z)_i^2`` is the squared norm of row i (Bekas, Kokiopoulou, Saad, 2007).
    """
    if not probes or not c.numel():
        return None
    generator = torch.Generator(like.device).manual_seed(0)
    total = torch.zeros_like(c)
    for _ in range(probes):
        image = matvec(torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0))
        total.addcmul_(image, image)
    largest = total.max()
    if not bool(largest > 0.0):
        return None
    # A row that is zero but for rounding, eps of the largest, shall stay small.
    return total.clamp_min_(torch.finfo(total.dtype).eps ** 2 * largest).div_(probes).rsqrt_()


def _read_parameters(params: Parameters) -> tuple[_Leaves, Callable[[_Leaves], Any]]:
    """Return the tensors, and what makes the argument of the constraint of a list like them."""
    if isinstance(params, Tensor):
        return [params], lambda leaves: leaves[0]
    if isinstance(params, torch.nn.Module):
        params = params.named_parameters()
    elif isinstance(params, Mapping):
        params = params.items()
    entries: list[Any] = list(params)
    if entries and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries):
        names = [entry[0] for entry in entries]
        tensors = [entry[1] for entry in entries]
        return _all_tensors(tensors), lambda leaves: dict(zip(names, leaves, strict=True))
    return _all_tensors(entries), tuple


def _all_tensors(entries: list[Any]) -> _Leaves:
    for entry in entries:
        if not isinstance(entry, Tensor):
            raise TypeError(
                f"`params` holds a {type(entry).__name__}, expected a module, tensors, or names and tensors"
            )
    return entries


def _gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient, zeros for None."""
    gradient = tensor.grad
    if gradient is None:
        return torch.zeros_like(tensor, requires_grad=False)
    if gradient.layout != torch.strided:
        raise TypeError(f"a gradient has layout {gradient.layout}, expected a dense one: set sparse=False")
    return gradient.detach()


def _check_gamma(gamma: float) -> None:
    if not 0.0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma!r}, expected a finite number that is not negative, or None")


def _gamma_at(gamma: Gamma, step: int | None) -> float | None:
    """Return gamma of a step."""
    if callable(gamma):
        if step is None:
            raise ValueError("`gamma` is a function of the step and `step` is missing: give the number of steps done")
        gamma = gamma(step)
    if gamma is None:
        return None
    _check_gamma(gamma)
    return float(gamma)


def _norm(vector: Tensor) -> float:
    """Return the Euclidean norm."""
    return float(torch.linalg.vector_norm(vector))


def _code(status: Status) -> Any:
    return np.array([status], dtype=np.int8)


def _check_finite(name: str, norm: float) -> None:
    if not math.isfinite(norm):
        raise SolveError(f"{name} holds NaN or infinity", _code(Status.INVALID_INPUT))


def _report_failure(reason: StopReason, iterations: int, solver: _Solver) -> None:
    """Warn or raise."""
    message = (
        f"the projection onto the null space stopped after {iterations} iterations: {reason.name}, {reason.sentence}; "
        "J d = gamma c does not hold"
    )
    if solver.on_failure == "raise":
        raise SolveError(message, _code(Status.NOT_CONVERGED))
    warnings.warn(message, ProjectionWarning, stacklevel=3)
