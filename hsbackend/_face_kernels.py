"""Compiled KKT solves on a face."""

from __future__ import annotations

from hsbackend._blas import dot
from hsbackend._parallel import compile_kernel


@compile_kernel
def apply_inverse(
    start, stop, step, values, target, gram, scale, working, count, offset, inverse, out, scratch
):  # type: ignore[no-untyped-def]  # fmt: skip
    """``out_K = scale_K inverse (scale_K (values_K - target_K))`` with ragged working sets, refined once.

    ``gram`` is the scaled matrix that the inverses belong to; the inverse alone loses as many digits as its condition
    has, the refined solution half of them at most.
    """
    varying = 0 if scale.shape[0] == 1 else 1
    for b in range(start, stop, step):
        k = count[b]
        if k == 0:
            continue
        right, found = scratch[b, 0], scratch[b, 1]
        s = scale[b * varying]
        matrix = gram[b * varying]
        for i in range(k):
            w = working[b, i]
            right[i] = s[w] * (values[b, w] - target[b, w])
        for i in range(k):
            begin = offset[b] + i * k
            found[i] = dot(inverse[begin : begin + k], right, k)
        for i in range(k):
            row = matrix[working[b, i]]
            for j in range(k):
                right[i] -= row[working[b, j]] * found[j]
        for i in range(k):
            begin = offset[b] + i * k
            w = working[b, i]
            out[b, w] = s[w] * (found[i] + dot(inverse[begin : begin + k], right, k))


@compile_kernel
def box_kkt(
    start,
    stop,
    step,
    columns,
    row_index,
    entries,
    hessian,
    free,
    bounded_at,
    factor,
    offset,
    order,
    count,
    g,
    r,
    r_bound,
    u,
    w,
    w_bound,
    scratch,
):  # type: ignore[no-untyped-def]
    """Solve the KKT system of a box face, diagonal H: u_j = r_bound on active bounds, Schur system on the rows."""
    n = g.shape[1]
    varying = 0 if entries.shape[0] == 1 else 1
    varying_h = 0 if hessian.shape[0] == 1 else 1
    for b in range(start, stop, step):
        k = count[b]
        value = entries[b * varying]
        h = hessian[b * varying_h]
        t = scratch[b]
        for i in range(w.shape[1]):
            w[b, i] = 0.0
        # Row values of the minimiser without rows.
        for j in range(n):
            at = bounded_at[j]
            if free[b, j]:
                u[b, j] = g[b, j] / h[j]
            else:
                u[b, j] = r_bound[b, at]
            for e in range(columns[j], columns[j + 1]):
                w[b, row_index[e]] += value[e] * u[b, j]
        # Solve L D L' on the rows of the face (order lists them; dependent ones are not listed).
        base = offset[b]
        for i in range(k):
            t[i] = w[b, order[b, i]] - r[b, order[b, i]]
        for i in range(k):
            t[i] = (t[i] - dot(factor[base + i * k : base + i * k + i], t, i)) / factor[base + i * k + i]
        for i in range(k - 1, -1, -1):
            t[i] /= factor[base + i * k + i]
            for j in range(i):
                t[j] -= t[i] * factor[base + i * k + j]
        for i in range(w.shape[1]):
            w[b, i] = 0.0
        for i in range(k):
            w[b, order[b, i]] = t[i]
        for j in range(n):
            pushed = 0.0
            for e in range(columns[j], columns[j + 1]):
                pushed += value[e] * w[b, row_index[e]]
            if free[b, j]:
                u[b, j] -= pushed / h[j]
                if bounded_at[j] >= 0:
                    w_bound[b, bounded_at[j]] = 0.0
            else:
                w_bound[b, bounded_at[j]] = g[b, j] - h[j] * u[b, j] - pushed
