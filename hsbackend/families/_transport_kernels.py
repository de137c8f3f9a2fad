"""Compiled projections onto transport polytopes, and the KKT solve on their faces.

    minimise  1/2 sum_ij h_ij (X_ij - V_ij)^2   subject to  X >= 0,  X 1 = r,  X'1 = c

has the solution ``X = max(T, 0)``, ``T_ij = V_ij - (a_i + b_j)/h_ij``, with multipliers (a, b) that minimise a convex
piecewise quadratic function. The multipliers of the longer side ("rows" below, whatever side they are) are eliminated:
for given b every row is balanced exactly, a scan per Newton step of one unknown. What is left, the semi-dual in b, has
the gradient ``c - X'1`` and the generalised Hessian

    S = D_c - M'D_r^-1 M,      M_ij = 1/h_ij where T_ij > 0 and 0 elsewhere,   D_r = Diag(M 1),   D_c = Diag(M'1),

the Laplacian of a graph on the columns with conductances ``C_jk = sum_i M_ij M_ik / (M 1)_i``. Its factorisation adds
and never subtracts, so a zero pivot is exact: it ends a connected component of the support and the right-hand side
there is the component's surplus, what its rows have to deliver and its columns do not take. While all components are
balanced, a semismooth Newton step with a line search is taken. A surplus has to leave over entries held at zero, and
multipliers may move component by component without changing X: shortest paths (slacks as lengths) from every surplus to
a deficit are the steepest move that holds, and open one entry for every component on the way. Without it Newton's
method stalls where marginals are small against the spread of V, that is next to linear assignment.

What Newton's method has not finished follows a path: with R the residual of the current point, the solutions for the
marginals ``(r, c) + (1 - s) R`` are piecewise linear in s. From s = 0 to 1 one entry after the other changes between
free and held, a few times the number of lines in all: finite, however the weights are.

T itself is kept and moved, not computed from a and b: X is exact to rounding also where V and the multipliers are many
orders larger than the marginals.

Sources: Li, Sun and Toh, "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
polytope" (2020) for the Newton method on the dual; Best, "An algorithm for the solution of the parametric quadratic
programming problem" (1996) for the path; Grassmann, Taksar and Heyman, "Regenerative analysis and steady
state distributions for Markov chains" (1985) for elimination without subtractions; Edmonds and Karp, "Theoretical
improvements in algorithmic efficiency for network flow problems" (1972) for shortest paths as a move of potentials.
"""

from __future__ import annotations

import numpy as np

from hsbackend._blas import dot
from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend.status import Status

_SOLVED = int(Status.SOLVED)
_INFEASIBLE = int(Status.INFEASIBLE)
_INVALID = int(Status.INVALID_INPUT)
_NOT_CONVERGED = int(Status.NOT_CONVERGED)

_EPS = 2.220446049250313e-16
#: An entry is "at zero to rounding" within this fraction of the data it comes from.
_ROUNDING = 16.0 * _EPS
#: Value of an entry just opened by a shortest path: positive, so that it counts as free, and nothing otherwise.
_OPEN = 1e-290
#: V larger than the largest marginal by this factor costs three digits of T on the way.
_FAR = 1024.0
#: Newton steps before the path is followed instead, and one more per line. Typical are 2 (4 x 4) to 10 (64 x 64);
#: weights that differ by many orders take more, because there the line search stops at one kink after the other.
_PATIENCE = 30
#: Steps for which the residual may stay at a rounding without getting smaller.
_STALLED = 10
#: Trials of a line search, regula falsi with a bisection every third time: enough for any bracket of doubles.
_MOST_TRIALS = 60


@inline_kernel
def _balance_rows(table, inverse, supply, a, lean, d, length, rows, columns, trial, a_trial, residual):
    """Move along (lean, d), then every row's own multiplier until the row sums to its supply.

    ``trial = T - (length (lean_i + d_j) + move_i)/h``, and ``residual`` gets the column sums of its positive part.
    """
    for j in range(columns):
        residual[j] = 0.0
    for i in range(rows):
        shift = length * lean[i]
        slope = 0.0
        excess = -supply[i]
        for j in range(columns):
            t = table[i, j] - (shift + length * d[j]) * inverse[i, j]
            trial[i, j] = t
            if t > 0.0:
                slope += inverse[i, j]
                excess += t
        slope_before = -1.0
        excess_before = 0.0
        # The sum of a row is convex and decreasing in its multiplier: Newton's method is monotone after one step.
        for _step in range(columns + 8):
            if slope > 0.0:
                if abs(excess) <= 2.0 * _EPS * supply[i]:
                    break
                if slope == slope_before and abs(excess) >= 0.5 * abs(excess_before):  # rounding
                    break
                move = excess / slope
            else:  # nothing is free: let the entry nearest to zero carry the row
                nearest = -np.inf
                move = 0.0
                for j in range(columns):
                    t = trial[i, j] / inverse[i, j]
                    if t > nearest:
                        nearest = t
                        move = t - supply[i] / inverse[i, j]
            shift += move
            slope_before = slope
            excess_before = excess
            slope = 0.0
            excess = -supply[i]
            for j in range(columns):
                t = trial[i, j] - move * inverse[i, j]
                trial[i, j] = t
                if t > 0.0:
                    slope += inverse[i, j]
                    excess += t
        a_trial[i] = a[i] + shift
        for j in range(columns):
            residual[j] += max(trial[i, j], 0.0)


@inline_kernel
def _conductances(table, inverse, rows, columns, graph, degree, free):
    """Upper triangle of the column graph of the entries ``T > 0``; ``degree = M 1``."""
    for j in range(columns):
        for k in range(j + 1, columns):
            graph[j, k] = 0.0
    for i in range(rows):
        count = 0
        total = 0.0
        for j in range(columns):
            if table[i, j] > 0.0:
                free[count] = j
                count += 1
                total += inverse[i, j]
        degree[i] = total
        for p in range(count - 1):
            j = free[p]
            share = inverse[i, j] / total
            for q in range(p + 1, count):
                graph[j, free[q]] += share * inverse[i, free[q]]


@inline_kernel
def _factor(graph, columns, pivot):
    """Eliminate one column after the other (star-mesh transforms); a zero pivot ends a component."""
    for k in range(columns):
        total = 0.0
        for j in range(k + 1, columns):
            total += graph[k, j]
        pivot[k] = total
        if total > 0.0:
            for i in range(k + 1, columns):
                share = graph[k, i] / total
                if share > 0.0:
                    for j in range(i + 1, columns):
                        graph[i, j] += share * graph[k, j]


@inline_kernel
def _label(graph, columns, pivot, label):
    """Name every column's component after its last column."""
    for k in range(columns - 1, -1, -1):
        label[k] = k
        if pivot[k] > 0.0:
            for j in range(k + 1, columns):
                if graph[k, j] > 0.0:
                    label[k] = label[j]
                    break


@inline_kernel
def _forward(graph, columns, pivot, y):
    """First half of the solve; leaves the sum over a component at its last column."""
    for k in range(columns):
        if pivot[k] > 0.0:
            scaled = y[k] / pivot[k]
            for j in range(k + 1, columns):
                y[j] += graph[k, j] * scaled


@inline_kernel
def _backward(graph, columns, pivot, y, d):
    """Second half of the solve; the last column of a component gets 0."""
    for k in range(columns - 1, -1, -1):
        d[k] = 0.0
        if pivot[k] > 0.0:
            total = y[k]
            for j in range(k + 1, columns):
                total += graph[k, j] * d[j]
            d[k] = total / pivot[k]


@inline_kernel
def _connect(table, inverse, a, b, surplus, rounding, rows, columns, label, slack, link, distance, parent, state):
    """Move multipliers along shortest paths from components with a surplus to those with a deficit; open the paths.

    ``surplus`` is read at the last column of a component. Returns the largest surplus that has no way to a deficit.
    """
    for j in range(columns):
        for k in range(columns):
            slack[j, k] = np.inf
    for i in range(rows):
        mine = -1
        for j in range(columns):
            if table[i, j] > 0.0:
                mine = label[j]
                break
        for j in range(columns):
            gap = -table[i, j] / inverse[i, j]
            if label[j] != mine and gap < slack[mine, label[j]]:
                slack[mine, label[j]] = gap
                link[mine, label[j]] = i * columns + j
    for k in range(columns):
        distance[k] = 0.0 if label[k] == k and surplus[k] < -rounding else np.inf
        parent[k] = -1
        state[k] = 0 if label[k] == k else 2  # 0 open, 1 on a path, 2 done
    while True:  # Dijkstra, from the deficits backwards
        nearest = np.inf
        at = -1
        for k in range(columns):
            if state[k] == 0 and distance[k] < nearest:
                nearest = distance[k]
                at = k
        if at < 0:
            break
        state[at] = 2
        for k in range(columns):
            if state[k] == 0 and nearest + slack[k, at] < distance[k]:
                distance[k] = nearest + slack[k, at]
                parent[k] = at
    stuck = 0.0
    farthest = 0.0
    for k in range(columns):
        if label[k] == k and surplus[k] > rounding:
            if distance[k] == np.inf:
                stuck = max(stuck, surplus[k])
                continue
            farthest = max(farthest, distance[k])
            at = k
            while parent[at] >= 0 and state[at] != 1:
                state[at] = 1
                at = parent[at]
    for k in range(columns):
        distance[k] = min(distance[k], farthest)
    for i in range(rows):
        mine = -1
        for j in range(columns):
            if table[i, j] > 0.0:
                mine = label[j]
                break
        a[i] -= distance[mine]
        for j in range(columns):
            if label[j] != mine:
                moved = table[i, j] + (distance[mine] - distance[label[j]]) * inverse[i, j]
                table[i, j] = min(moved, 0.0)  # held entries stay held; at most a rounding is lost
    for j in range(columns):
        b[j] += distance[label[j]]
    for k in range(columns):
        if state[k] == 1:
            entry = link[k, parent[k]]
            table[entry // columns, entry % columns] = _OPEN
    return stuck


@inline_kernel
def _first_change(table, inverse, lean, d, rounding, rows, columns):
    """Move T along (lean, d) until an entry changes between free and held, and change it; return how far, 1 at most."""
    length = 1.0
    row = -1
    column = -1
    for i in range(rows):
        for j in range(columns):
            rate = -(lean[i] + d[j]) * inverse[i, j]
            # What only carries rounding stays as it is, or ties would go to and fro.
            noise = 1e-13 * (abs(lean[i]) + abs(d[j])) * inverse[i, j] + rounding
            t = table[i, j]
            if (rate < -noise and t > 0.0 and -t > length * rate) or (
                rate > noise and not t > 0.0 and -t < length * rate
            ):
                length = -t / rate
                row = i
                column = j
    opens = row >= 0 and not table[row, column] > 0.0
    for i in range(rows):
        for j in range(columns):
            t = table[i, j]
            moved = t - length * (lean[i] + d[j]) * inverse[i, j]
            table[i, j] = max(moved, _OPEN) if t > 0.0 else min(moved, 0.0)
    if row >= 0:
        table[row, column] = _OPEN if opens else 0.0
    return length if row >= 0 else 1.0


@inline_kernel
def _start(table, inverse, supply, demand, rows, columns, a, b):
    """Ignore ``X >= 0``: one pass, exact for unit weights. Return whether every line has an entry."""
    for i in range(rows):
        slope = 0.0
        excess = -supply[i]
        for j in range(columns):
            if table[i, j] > -np.inf:
                slope += inverse[i, j]
                excess += table[i, j]
        if slope == 0.0:
            return False
        a[i] = excess / slope
        for j in range(columns):
            table[i, j] -= a[i] * inverse[i, j]
    for j in range(columns):
        slope = 0.0
        excess = -demand[j]
        for i in range(rows):
            if table[i, j] > -np.inf:
                slope += inverse[i, j]
                excess += table[i, j]
        if slope == 0.0:
            return False
        b[j] = excess / slope
        for i in range(rows):
            table[i, j] -= b[j] * inverse[i, j]
    return True


@inline_kernel
def _largest(values, count):
    worst = 0.0
    for j in range(count):
        worst = max(worst, abs(values[j]))
    return worst


@inline_kernel
def _newton(
    current, trial, inverse, supply, demand, rows, columns, allowance, patience, a, a_trial, b, d, lean, y, residual,
    residual_trial, pivot, graph, degree, free, label, slack, link, distance, parent, state,
):  # fmt: skip
    """Solve one item from the start in ``current``; return its outcome and whether T ended in ``trial``."""
    table = current
    total = 0.0
    scale = 0.0
    for i in range(rows):
        total += supply[i]
        scale = max(scale, supply[i])
    for j in range(columns):
        scale = max(scale, demand[j])
    rounding = 16.0 * _EPS * total
    good = 16.0 * _EPS * scale
    bearable = 4.0 * rounding
    norm_before = np.inf
    stalled = 0
    length = 1.0
    swapped = False
    unbalanced = True
    for step in range(1000 + 20 * (rows + columns)):
        if unbalanced:
            for i in range(rows):
                lean[i] = 0.0
            for j in range(columns):
                d[j] = 0.0
            _balance_rows(table, inverse, supply, a, lean, d, 0.0, rows, columns, table, a, residual)
            for j in range(columns):
                residual[j] -= demand[j]
            unbalanced = False
        norm = _largest(residual, columns)
        if norm > 0.5 * norm_before and length == 1.0:
            stalled += 1 if norm <= bearable else 0
        else:
            stalled = 0
        if norm <= good or stalled == _STALLED:
            return _SOLVED, swapped
        norm_before = norm
        following = step >= patience
        for _round in range(columns):  # every round joins components
            _conductances(table, inverse, rows, columns, graph, degree, free)
            _factor(graph, columns, pivot)
            for j in range(columns):
                y[j] = residual[j]
            for i in range(rows):
                lean[i] = 0.0
                if following:  # rows are balanced to rounding only
                    for j in range(columns):
                        lean[i] += max(table[i, j], 0.0)
                    lean[i] -= supply[i]
                    for j in range(columns):
                        y[j] -= inverse[i, j] * lean[i] / degree[i] if table[i, j] > 0.0 else 0.0
            _forward(graph, columns, pivot, y)
            balanced = True
            for k in range(columns):
                balanced = balanced and (pivot[k] > 0.0 or abs(y[k]) <= rounding)
            if balanced:
                break
            _label(graph, columns, pivot, label)
            stuck = _connect(
                table, inverse, a, b, y, rounding, rows, columns, label, slack, link, distance, parent, state
            )  # fmt: skip
            if stuck > allowance * total:
                return _INFEASIBLE, swapped
            if stuck > 0.0:  # the data is balanced to rounding only, and so is the result
                rounding = max(rounding, 2.0 * stuck)
                bearable = max(bearable, 4.0 * stuck)
        _backward(graph, columns, pivot, y, d)
        for i in range(rows):
            for j in range(columns):
                lean[i] -= inverse[i, j] * d[j] if table[i, j] > 0.0 else 0.0
            lean[i] /= degree[i]
        if following:
            length = _first_change(table, inverse, lean, d, 64.0 * _EPS * scale, rows, columns)
            for j in range(columns):
                b[j] += length * d[j]
                residual[j] = -demand[j]
            unbalanced = length == 1.0
            for i in range(rows):
                a[i] += length * lean[i]
                any_free = False
                for j in range(columns):
                    residual[j] += max(table[i, j], 0.0)
                    any_free = any_free or table[i, j] > 0.0
                unbalanced = unbalanced or not any_free  # a supply of the size of a rounding
            continue
        slope_start = dot(residual, d, columns)
        length = 1.0
        near = 0.0
        slope_near = slope_start
        far = 0.0
        slope_far = 0.0
        for search in range(_MOST_TRIALS):
            _balance_rows(
                table, inverse, supply, a, lean, d, length, rows, columns, trial, a_trial, residual_trial
            )  # fmt: skip
            for j in range(columns):
                residual_trial[j] -= demand[j]
            slope = dot(residual_trial, d, columns)
            # The dual is convex: descent all the way while the slope is positive; a full step may be short, but a
            # shortened one must not be.
            if slope < -0.1 * slope_start and _largest(residual_trial, columns) > good:
                far = length
                slope_far = slope
            elif slope > 0.5 * slope_start and far > 0.0:
                near = length
                slope_near = slope
            else:
                break
            if far - near <= 4.0 * _EPS * far:
                break
            part = 0.5 if search % 3 == 2 else slope_near / (slope_near - slope_far)
            length = near + (far - near) * min(max(part, 0.02), 0.98)
        table, trial = trial, table
        residual, residual_trial = residual_trial, residual
        swapped = not swapped
        for i in range(rows):
            a[i] = a_trial[i]
        for j in range(columns):
            b[j] += length * d[j]
    return _SOLVED if norm_before <= bearable else _NOT_CONVERGED, swapped


@compile_kernel
def transport_items(
    start, stop, step, point, weight, rhs, k1, k2, support, allowance, primal, multipliers, face, status
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Project; ``allowance`` is the relative difference of the sums of marginals that counts as rounding."""
    n = k1 * k2
    m = k1 + k2
    weighted = weight.shape[1] > 0
    weight_varies = 1 if weight.shape[0] > 1 else 0
    rhs_varies = 1 if rhs.shape[0] > 1 else 0
    # Rows of the item as the kernel sees it are the longer side.
    flip = k1 < k2
    most_rows, most_columns = (k2, k1) if flip else (k1, k2)
    row_stride, column_stride = (1, k2) if flip else (k2, 1)
    row_first, column_first = (k1, 0) if flip else (0, k1)
    first = np.empty((most_rows, most_columns))
    second = np.empty((most_rows, most_columns))
    inverse = np.ones((most_rows, most_columns))
    supply = np.empty(most_rows)
    demand = np.empty(most_columns)
    a = np.empty(most_rows)
    a_trial = np.empty(most_rows)
    b = np.empty(most_columns)
    d = np.empty(most_columns)
    lean = np.empty(most_rows)
    y = np.empty(most_columns)
    residual = np.empty(most_columns)
    residual_trial = np.empty(most_columns)
    pivot = np.empty(most_columns)
    graph = np.empty((most_columns, most_columns))
    degree = np.empty(most_rows)
    free = np.empty(most_columns, dtype=np.int64)
    label = np.empty(most_columns, dtype=np.int64)
    slack = np.empty((most_columns, most_columns))
    link = np.empty((most_columns, most_columns), dtype=np.int64)
    distance = np.empty(most_columns)
    parent = np.empty(most_columns, dtype=np.int64)
    state = np.empty(most_columns, dtype=np.int64)
    rows_used = np.empty(most_rows, dtype=np.int64)  # their place among the rows with a positive supply, or -1
    columns_used = np.empty(most_columns, dtype=np.int64)
    nu = np.empty(m)
    for item in range(start, stop, step):
        v = point[item]
        h = weight[item * weight_varies]
        marginals = rhs[item * rhs_varies]
        outcome = _SOLVED
        for e in range(n):
            if np.isnan(v[e]) or v[e] == np.inf:
                outcome = _INVALID
        if weighted:
            for e in range(n):
                if not (h[e] > 0.0 and h[e] < np.inf):
                    outcome = _INVALID
        largest = 0.0
        smallest = 0.0
        for k in range(m):
            if not np.isfinite(marginals[k]):
                outcome = _INVALID
            largest = max(largest, np.float64(marginals[k]))
            smallest = min(smallest, np.float64(marginals[k]))
        rows = 0
        columns = 0
        supplied = 0.0
        demanded = 0.0
        for i in range(most_rows):
            rows_used[i] = -1
            if marginals[row_first + i] > 0.0:
                rows_used[i] = rows
                supply[rows] = marginals[row_first + i]
                supplied += supply[rows]
                rows += 1
        for j in range(most_columns):
            columns_used[j] = -1
            if marginals[column_first + j] > 0.0:
                columns_used[j] = columns
                demand[columns] = marginals[column_first + j]
                demanded += demand[columns]
                columns += 1
        if outcome == _SOLVED and (
            smallest < -allowance * largest or abs(supplied - demanded) > allowance * max(supplied, demanded)
        ):
            outcome = _INFEASIBLE
        swapped = False
        if outcome == _SOLVED and rows > 0:
            if supplied != demanded:  # to rounding: meet in the middle
                for i in range(rows):
                    supply[i] *= 0.5 * (supplied + demanded) / supplied
                for j in range(columns):
                    demand[j] *= 0.5 * (supplied + demanded) / demanded
            # With weights the way may lead through multipliers far larger than those it ends at: start again there, on
            # the path, which makes no detours. Where V is far larger than the marginals, every move of T on the way
            # rounds like V: start again where the moves still to come are small.
            size = 0.0
            for e in range(n):
                if v[e] > -np.inf:
                    size = max(size, abs(np.float64(v[e])))
            for attempt in range(2 if weighted or size > _FAR * largest else 1):
                for i in range(most_rows):
                    p = rows_used[i]
                    if p >= 0:
                        for j in range(most_columns):
                            q = columns_used[j]
                            if q >= 0:
                                e = i * row_stride + j * column_stride
                                first[p, q] = v[e]
                                if weighted:
                                    inverse[p, q] = 1.0 / h[e]
                                if attempt > 0:  # V - (a + b), the sum with its rounding (Knuth's two-sum)
                                    total = a[p] + b[q]
                                    part = total - a[p]
                                    rest = (a[p] - (total - part)) + (b[q] - part)
                                    first[p, q] -= total * inverse[p, q]
                                    first[p, q] -= rest * inverse[p, q]
                patience = 0 if attempt > 0 and weighted else _PATIENCE + rows + columns
                if attempt == 0 and not _start(first, inverse, supply, demand, rows, columns, a, b):
                    outcome = _INFEASIBLE
                if outcome == _SOLVED:
                    outcome, swapped = _newton(
                        first, second, inverse, supply, demand, rows, columns, allowance, patience, a, a_trial, b, d,
                        lean, y, residual, residual_trial, pivot, graph, degree, free, label, slack, link, distance,
                        parent, state,
                    )  # fmt: skip
        status[item] = outcome
        if outcome != _SOLVED:
            for e in range(n):
                primal[item, e] = np.nan
                face[item, e] = 0
            for k in range(m):
                multipliers[item, k] = np.nan
            continue

        # Lines that sum to zero were left out: the least multipliers that hold their entries at zero.
        for j in range(most_columns):
            if rows == 0:
                nu[column_first + j] = 0.0
            elif columns_used[j] >= 0:
                nu[column_first + j] = b[columns_used[j]]
        for i in range(most_rows):
            if rows_used[i] >= 0:
                nu[row_first + i] = a[rows_used[i]]
            else:
                least = -np.inf
                for j in range(most_columns):
                    if rows == 0 or columns_used[j] >= 0:
                        e = i * row_stride + j * column_stride
                        least = max(least, v[e] * (h[e] if weighted else 1.0) - nu[column_first + j])
                nu[row_first + i] = least if least > -np.inf else 0.0
        for j in range(most_columns):
            if rows > 0 and columns_used[j] < 0:
                least = -np.inf
                for i in range(most_rows):
                    e = i * row_stride + j * column_stride
                    least = max(least, v[e] * (h[e] if weighted else 1.0) - nu[row_first + i])
                nu[column_first + j] = least if least > -np.inf else 0.0
        # (1, -1) is always free: the multipliers of least norm.
        shift = 0.0
        for k in range(k1):
            shift += nu[k]
        for k in range(k1, m):
            shift -= nu[k]
        shift /= m
        for k in range(m):
            nu[k] += -shift if k < k1 else shift
            multipliers[item, k] = nu[k]

        table = second if swapped else first
        for i in range(most_rows):
            alpha = nu[row_first + i]
            p = rows_used[i]
            for j in range(most_columns):
                beta = nu[column_first + j]
                q = columns_used[j]
                e = i * row_stride + j * column_stride
                g = 1.0 / h[e] if weighted else 1.0
                used = p >= 0 and q >= 0
                t = table[p, q] if used else v[e] - (alpha + beta) * g
                band = _ROUNDING * (abs(v[e]) + (abs(alpha) + abs(beta)) * g)
                if v[e] == -np.inf:
                    face[item, e] = 0
                elif support:
                    face[item, e] = 1 if t >= -band else 0
                else:
                    face[item, e] = 1 if t > band else 0
                primal[item, e] = t if used and t > _OPEN else 0.0


@compile_kernel
def transport_kkt_items(
    start, stop, step, face, weight, rhs_primal, rhs_rows, rhs_bounds, k1, k2, u, w, wb
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve ``[Diag(M1) M; M' Diag(M'1)] (a, b) = N H^-1 g - r`` on the free entries, component by component."""
    weighted = weight.shape[1] > 0
    weight_varies = 1 if weight.shape[0] > 1 else 0
    with_rows = rhs_rows.shape[1] > 0
    with_bounds = rhs_bounds.shape[1] > 0
    flip = k1 < k2
    rows, columns = (k2, k1) if flip else (k1, k2)
    row_stride, column_stride = (1, k2) if flip else (k2, 1)
    row_first, column_first = (k1, 0) if flip else (0, k1)
    mask = np.empty((rows, columns))  # M
    inverse = np.ones((rows, columns))
    degree = np.empty(rows)
    free = np.empty(columns, dtype=np.int64)
    graph = np.empty((columns, columns))
    pivot = np.empty(columns)
    label = np.empty(columns, dtype=np.int64)
    part = np.empty(rows, dtype=np.int64)  # component of a row, -1 without a free entry
    a = np.empty(rows)
    b = np.empty(columns)
    y = np.empty(columns)
    load_rows = np.empty(rows)
    load_columns = np.empty(columns)
    gap = np.empty(columns)
    size = np.empty(columns)
    for item in range(start, stop, step):
        h = weight[item * weight_varies]
        g = rhs_primal[item]
        for i in range(rows):
            load_rows[i] = -rhs_rows[item, row_first + i] if with_rows else 0.0
        for j in range(columns):
            load_columns[j] = -rhs_rows[item, column_first + j] if with_rows else 0.0
        for i in range(rows):
            for j in range(columns):
                e = i * row_stride + j * column_stride
                mask[i, j] = 0.0
                if face[item, e] != 0:
                    if weighted:
                        inverse[i, j] = 1.0 / h[e]
                    mask[i, j] = inverse[i, j]
                    load_rows[i] += g[e] * inverse[i, j]
                    load_columns[j] += g[e] * inverse[i, j]
                elif with_bounds:
                    load_rows[i] += rhs_bounds[item, e]
                    load_columns[j] += rhs_bounds[item, e]
        _conductances(mask, inverse, rows, columns, graph, degree, free)
        _factor(graph, columns, pivot)
        _label(graph, columns, pivot, label)

        # The right-hand side sums to zero over a component but for rounding, or an inconsistent r: project.
        for j in range(columns):
            gap[j] = 0.0
            size[j] = 0.0
        for j in range(columns):
            gap[label[j]] += load_columns[j]
            size[label[j]] += 1.0
        for i in range(rows):
            part[i] = -1
            for j in range(columns):
                if mask[i, j] > 0.0:
                    part[i] = label[j]
                    gap[label[j]] -= load_rows[i]
                    size[label[j]] += 1.0
                    break
        for i in range(rows):
            if part[i] >= 0:
                load_rows[i] += gap[part[i]] / size[part[i]]
        for j in range(columns):
            load_columns[j] -= gap[label[j]] / size[label[j]]
            y[j] = load_columns[j]
        for i in range(rows):
            if part[i] >= 0:
                share = load_rows[i] / degree[i]
                for j in range(columns):
                    y[j] -= mask[i, j] * share
        _forward(graph, columns, pivot, y)
        _backward(graph, columns, pivot, y, b)
        for j in range(columns):
            gap[j] = 0.0
        for i in range(rows):
            a[i] = 0.0
            if part[i] >= 0:
                total = load_rows[i]
                for j in range(columns):
                    total -= mask[i, j] * b[j]
                a[i] = total / degree[i]
                gap[part[i]] += a[i]
        # Least norm: (1, -1) on a component changes nothing.
        for j in range(columns):
            gap[label[j]] -= b[j]
        for i in range(rows):
            if part[i] >= 0:
                a[i] -= gap[part[i]] / size[part[i]]
            w[item, row_first + i] = a[i]
        for j in range(columns):
            b[j] += gap[label[j]] / size[label[j]]
            w[item, column_first + j] = b[j]

        for i in range(rows):
            for j in range(columns):
                e = i * row_stride + j * column_stride
                rest = g[e] - a[i] - b[j]
                if face[item, e] != 0:
                    u[item, e] = rest * inverse[i, j]
                    wb[item, e] = 0.0
                else:
                    value = rhs_bounds[item, e] if with_bounds else 0.0
                    u[item, e] = value
                    # A weight that is not a number belongs to an item that failed.
                    wb[item, e] = rest - (h[e] * value if weighted and np.isfinite(h[e]) else value)
