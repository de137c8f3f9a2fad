"""Compiled scalars of LSMR: what :mod:`hsbackend.lsmr` does with tensors, for each item in main memory.

Rows of ``state``, named as in the paper: 0 alpha, 1 beta, 2 alphabar, 3 zeta, 4 zetabar, 5 rho, 6 rhobar, 7 cbar,
8 sbar, 9 betadd, 10 betad, 11 rhodold, 12 tautildeold, 13 thetatilde, 14 d, 15 |A|^2 so far, 16 largest and
17 smallest singular value of the bidiagonal matrix so far. Rows of ``factors``: 0 ``-alpha``, 1 ``1/beta``,
2 ``-beta``, 3 ``1/alpha``, 4 ``-f``, 5 ``g``, 6 ``-e``. Rows of ``figures``: those of
:class:`hsbackend.lsmr.Figures`. An item that has stopped gets zero factors.
"""

from __future__ import annotations

import math

from hsbackend._parallel import compile_kernel, inline_kernel


@inline_kernel
def _rotation(a, b):
    """Return c, s, r with ``[c s; -s c] [a; b] = [r; 0]``."""
    r = math.hypot(a, b)
    if r == 0.0:
        return 1.0, 0.0, 0.0
    return a / r, b / r, r


@inline_kernel
def _ratio(numerator, denominator):
    """Divide; zero where the denominator is zero."""
    return 0.0 if denominator == 0.0 else numerator / denominator


@compile_kernel
def take_beta(norm, state, factors, reason):  # type: ignore[no-untyped-def]
    """Note ``beta = norm`` and the factors that belong to it; return whether an item has to be set to zero."""
    bad = False
    for b in range(norm.shape[0]):
        beta = float(norm[b])
        state[1, b] = beta
        factors[2, b] = -beta
        usable = math.isfinite(beta) and beta > 0.0 and reason[b] < 0
        factors[1, b] = 1.0 / beta if usable else 0.0
        bad = bad or not math.isfinite(beta)
    return bad


@compile_kernel
def take_alpha(norm, state, factors, reason, figures, damp, damped, first):  # type: ignore[no-untyped-def]
    """Note ``alpha = norm``, do the rotations of the step; return whether an item has to be set to zero."""
    bad = False
    for b in range(norm.shape[0]):
        alpha = float(norm[b])
        beta = state[1, b]
        if not math.isfinite(alpha):
            bad = True
        if reason[b] >= 0:
            factors[0, b] = factors[3, b] = factors[4, b] = factors[5, b] = factors[6, b] = 0.0
            continue
        chat, shat, alphahat = 1.0, 0.0, state[2, b]
        if damped:
            chat, shat, alphahat = _rotation(state[2, b], damp[b])
        c, s, rho = _rotation(alphahat, beta)
        thetanew = s * alpha
        thetabar = state[8, b] * rho
        rhotemp = state[7, b] * rho
        cbar, sbar, rhobar = _rotation(rhotemp, thetanew)
        zeta_old, rho_old, rhobar_old = state[3, b], state[5, b], state[6, b]
        zeta = cbar * state[4, b]
        zetabar = -sbar * state[4, b]
        factors[0, b] = -alpha
        factors[3, b] = 1.0 / alpha if math.isfinite(alpha) and alpha > 0.0 else 0.0
        factors[4, b] = -_ratio(thetabar * rho, rho_old * rhobar_old)
        factors[5, b] = _ratio(zeta, rho * rhobar)
        factors[6, b] = -_ratio(thetanew, rho)

        betaacute = chat * state[9, b]
        betacheck = shat * state[9, b]
        d = state[14, b] + betacheck * betacheck
        betahat = c * betaacute
        betadd = -s * betaacute
        ctilde, stilde, rhotilde = _rotation(state[11, b], thetabar)
        thetatilde = stilde * rhobar
        rhodold = ctilde * rhobar
        betad = ctilde * betahat - stilde * state[10, b]
        tautildeold = _ratio(zeta_old - state[13, b] * state[12, b], rhotilde)
        taud = _ratio(zeta - thetatilde * tautildeold, rhodold)
        squared = state[15, b] + beta * beta
        largest = max(state[16, b], rhobar_old)
        smallest = state[17, b] if first else min(state[17, b], rhobar_old)
        figures[0, b] = math.sqrt(d + (betad - taud) ** 2 + betadd * betadd)
        figures[1, b] = abs(zetabar)
        figures[2, b] = math.sqrt(squared)
        low = min(smallest, rhotemp)
        figures[3, b] = max(largest, rhotemp) / low if low != 0.0 else math.inf

        state[0, b], state[2, b] = alpha, c * alpha
        state[3, b], state[4, b] = zeta, zetabar
        state[5, b], state[6, b], state[7, b], state[8, b] = rho, rhobar, cbar, sbar
        state[9, b], state[10, b], state[11, b] = betadd, betad, rhodold
        state[12, b], state[13, b], state[14, b] = tautildeold, thetatilde, d
        state[15, b], state[16, b], state[17, b] = squared + alpha * alpha, largest, smallest
        if not math.isfinite(factors[5, b]):
            factors[5, b] = 0.0
    return bad


@compile_kernel
def decide(step, norm_x, norm_rhs, figures, reason, steps, atol, btol, conlim, unit):  # type: ignore[no-untyped-def]
    """Note the stop reason of items that stop at this step; return how many go on."""
    going = 0
    for b in range(norm_x.shape[0]):
        if reason[b] >= 0:
            continue
        figures[4, b] = float(norm_x[b])
        steps[b] = step
        residual, normal, matrix, condition = figures[0, b], figures[1, b], figures[2, b], figures[3, b]
        safe = norm_rhs[b] if norm_rhs[b] != 0.0 else 1.0
        test1 = residual / safe
        size = matrix * residual
        test2 = normal / size if size != 0.0 else math.inf
        growth = matrix * figures[4, b] / safe
        if not math.isfinite(residual + normal):
            reason[b] = 8
        elif test1 <= btol + atol * growth:
            reason[b] = 1
        elif test2 <= atol:
            reason[b] = 2
        elif condition >= conlim:
            reason[b] = 3
        elif test1 / (1.0 + growth) <= unit:
            reason[b] = 4
        elif test2 <= unit:
            reason[b] = 5
        elif condition * unit >= 1.0:
            reason[b] = 6
        else:
            going += 1
    return going
