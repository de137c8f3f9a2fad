"""Projections and quadratic programs as modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.polyhedron import Polyhedron, check_rescue, project
from hsbackend.qp import OnFailure, QPSolution, check_options, check_smoothing, solve_given


def _register(module: torch.nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Keep tensors: parameters as parameters, the others as buffers."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


class Projection(torch.nn.Module):
    """Project the input onto a polyhedron.

        forward(v) = argmin  1/2 sum_j h_j (x_j - v_j)^2    subject to   x in C

    The tensors that describe the set are buffers of the module, or parameters where they were given as
    :class:`torch.nn.Parameter` (they are trained then), under the names that ``polyhedron.tensors`` shows: they are in
    the ``state_dict`` and follow ``.to()``. Numbers are constants.

    Args:
        polyhedron: the set C.
        weight: (..., *event_shape) tensor h > 0, the diagonal metric; a buffer or parameter too. None for Euclidean.
        jacobian: as for :func:`hsbackend.project`.
        on_failure: as for :func:`hsbackend.project`.

    Raises:
        InvalidOptionError: if an option has an unknown value, or ``on_failure="closest"`` with a named set.

    Notes:
        :meth:`forward` takes and returns what :func:`hsbackend.project` does.
    """

    weight: Tensor | None

    def __init__(
        self, polyhedron: Polyhedron, *, weight: Tensor | None = None, jacobian: Choice = "active",
        on_failure: OnFailure = "raise",
    ) -> None:  # fmt: skip
        """Register the tensors."""
        super().__init__()
        check_options(jacobian, on_failure)
        if on_failure == "closest":
            check_rescue(polyhedron)
        self.jacobian: Choice = jacobian
        self.on_failure: OnFailure = on_failure
        tensors = polyhedron.tensors
        self._names = tuple(tensors)
        _register(self, {**tensors, "weight": weight})
        # The module's own tensors take the place of these, which would otherwise be kept twice.
        self._template = polyhedron.replace({name: torch.empty(0) for name in tensors})

    @property
    def polyhedron(self) -> Polyhedron:
        """The set, with the tensors of the module."""
        if not self._names:
            return self._template
        return self._template.replace({name: getattr(self, name) for name in self._names})

    def forward(self, v: Tensor) -> Tensor:
        """Project v (..., *event_shape)."""
        return project(v, self.polyhedron, weight=self.weight, jacobian=self.jacobian, on_failure=self.on_failure)

    def extra_repr(self) -> str:
        """Name the set."""
        return f"{self.polyhedron!r}, jacobian={self.jacobian!r}, on_failure={self.on_failure!r}"


class QP(torch.nn.Module):
    """Solve a quadratic or linear program, part of whose data belongs to the module.

        minimise   1/2 x'Qx + q'x    subject to   A x = b,   G x <= h,   lower <= x <= upper

    Data given here are buffers of the module, or parameters where they are :class:`torch.nn.Parameter`; the others are
    given with each call.

    Args:
        Q: as for :func:`hsbackend.solve_qp`; None to give it with the call, here and for all others. Where it is
            neither here nor there it is zero, a linear program.
        q: linear term.
        A: rows of the equations.
        b: their right-hand side.
        G: rows of the inequalities.
        h: their right-hand side.
        lower: lower bounds.
        upper: upper bounds.
        tolerance: as for :func:`hsbackend.solve_qp`.
        jacobian: as for :func:`hsbackend.solve_qp`.
        on_failure: as for :func:`hsbackend.solve_qp`.
        smoothing: as for :func:`hsbackend.solve_qp`; a tensor is a buffer or parameter of the module.
        smoothing_centre: as for :func:`hsbackend.solve_qp`; a buffer or parameter too.

    Raises:
        InvalidOptionError: if an option has an unknown value.
        ValueError: if ``smoothing`` is a negative number.

    Notes:
        :meth:`forward` returns the :class:`hsbackend.QPSolution` of :func:`hsbackend.solve_qp`. Buffers without batch
        axes are analysed and factored once, and again when their values change (also in place).
    """

    smoothing: float | Tensor
    smoothing_centre: Tensor | None

    def __init__(
        self, Q: Tensor | None = None, q: Tensor | None = None, A: Tensor | None = None, b: Tensor | None = None,
        G: Tensor | None = None, h: Tensor | None = None, lower: Tensor | None = None, upper: Tensor | None = None, *,
        tolerance: float = 1e-9, jacobian: Choice = "active", on_failure: OnFailure = "raise",
        smoothing: float | Tensor = 0.0, smoothing_centre: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Register the tensors."""
        super().__init__()
        check_options(jacobian, on_failure)
        check_smoothing(smoothing)
        self.tolerance = tolerance
        self.jacobian: Choice = jacobian
        self.on_failure: OnFailure = on_failure
        given = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        self._names = tuple(tensors)
        _register(self, tensors)
        _register(self, {"smoothing_centre": smoothing_centre})
        if isinstance(smoothing, Tensor):
            _register(self, {"smoothing": smoothing})
        else:
            self.smoothing = smoothing

    def forward(
        self, q: Tensor | None = None, *, Q: Tensor | None = None, A: Tensor | None = None, b: Tensor | None = None,
        G: Tensor | None = None, h: Tensor | None = None, lower: Tensor | None = None, upper: Tensor | None = None,
    ) -> QPSolution:  # fmt: skip
        """Solve with the module's data, replaced by what is given here.

        Raises:
            ValueError: if q is neither here nor in the module.
            UnsupportedProblemError: if Q is a buffer and not positive semidefinite.
        """
        data = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        kept = [name for name in self._names if data[name] is None]
        for name in kept:
            data[name] = getattr(self, name)
        options = self.tolerance, self.jacobian, self.on_failure, self.smoothing, self.smoothing_centre
        return solve_given(data, kept, *options)

    def extra_repr(self) -> str:
        """List the data of the module."""
        shapes = [f"{name}{tuple(getattr(self, name).shape)}" for name in self._names]
        smoothing = self.smoothing
        if isinstance(smoothing, Tensor):
            shapes.append(f"smoothing{tuple(smoothing.shape)}")
        elif smoothing:
            shapes.append(f"smoothing={smoothing}")
        return ", ".join([*shapes, f"jacobian={self.jacobian!r}", f"on_failure={self.on_failure!r}"])
