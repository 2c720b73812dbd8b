"""Bayes factors of the one-sample (paired) t-test, with a Cauchy prior on the standardised effect (JZS).

Rouder, Speckman, Sun, Morey and Iverson (2009): delta ~ Cauchy(0, scale), p(sigma^2) ~ 1/sigma^2. The Cauchy is a mixture
of normals, delta | g ~ N(0, g scale^2) with g ~ InvGamma(1/2, 1/2), so all that is left is an integral over g. With
u = log g its integrand is smooth and dies off on both sides, where the trapezoidal rule converges geometrically.
"""

import numpy as np
import scipy
from jaxtyping import Float

PRIOR_SCALE = float(np.sqrt(0.5))
_LOG_G = np.linspace(-6.0, 60.0, 2001)
"""Below, exp(-1 / 2g) < 1e-87; above, the integrand falls as 1/g, and g ~ t^2 / n carries the weight."""


def jzs_bf10(t: float, n: int, scale: float = PRIOR_SCALE) -> float:
    """How many times likelier t is under "some effect" than under "none". n pairs (or units) give n - 1 degrees of freedom.

    Infinite where it exceeds the largest float, about 1e308.
    """
    terms = _log_integrand(_checked(t, n, scale), n, scale)
    return _exponential(float(scipy.special.logsumexp(terms)))


def jzs_directional(t: float, n: int, scale: float = PRIOR_SCALE) -> float:
    """BF+0: the alternative is "an effect above 0", a half-Cauchy. For "below 0" give -t.

    It is 2 BF10 times the posterior chance of delta > 0 (Morey and Wagenmakers, 2014), which given g is Student's
    distribution function with n degrees of freedom, exactly.
    """
    g = np.exp(_LOG_G) * n * scale**2
    shrunk = g / (1 + g)
    spread = (n - 1) + t**2 / (1 + g)
    log_positive = np.log(np.maximum(scipy.special.stdtr(n, t * np.sqrt(n * shrunk / spread)), np.finfo(np.float64).tiny))
    terms = _log_integrand(_checked(t, n, scale), n, scale) + log_positive
    return _exponential(float(np.log(2) + scipy.special.logsumexp(terms)))


def _checked(t: float, n: int, scale: float) -> float:
    if n < 2 or not np.isfinite(t) or scale <= 0:
        raise ValueError(f"a Bayes factor needs a finite t, n >= 2 and a scale above 0; got t={t}, n={n}, scale={scale}")
    return t


def _log_integrand(t: float, n: int, scale: float) -> Float[np.ndarray, " g"]:
    """log of (likelihood ratio given g) x (density of u = log g) x (grid step)."""
    g = np.exp(_LOG_G)
    inflation = 1 + n * g * scale**2
    ratio = -0.5 * np.log(inflation) - n / 2 * (np.log1p(t**2 / (inflation * (n - 1))) - np.log1p(t**2 / (n - 1)))
    density = -0.5 * np.log(2 * np.pi) - 0.5 * _LOG_G - 0.5 / g
    return ratio + density + np.log(_LOG_G[1] - _LOG_G[0])


def _exponential(log_value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(log_value))
