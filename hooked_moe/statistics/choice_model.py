"""Plackett-Luce: does a metric predict the whole order of the active experts by what their removal costs?

At a position the k active experts are ordered by loss change, dearest first, as if chosen one after the other, each with
probability proportional to exp(beta z) among those left (Luce, 1959; Plackett, 1975); z is the metric, standardised. One
beta for all positions; beta = 0 is the metric that knows nothing. The metrics are compared by beta's Bayes factor and by
how well each predicts the orders of documents it was not fitted to.

Chosen from the top, the model weighs the top of an order more than its bottom. A metric that says how far an expert's loss
change is from zero, up or down, puts the same experts first and last, and would get a beta below 0 without any word of which
is which. So the log probability used here is the mean of two: of the order chosen dearest first by exp(beta z), and of the same
order chosen cheapest first by exp(-beta z). Reversing all orders then turns the sign of beta and changes nothing else. It is a
composite likelihood (Varin, Reid and Firth, 2011), which the sandwich error allows for.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float, Int, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS, DegenerateSample, cluster_sums, require_finite

PRIOR_SD = 0.5
"""Standard deviation of the prior of beta: in 95% of it a standard deviation of the metric multiplies the odds by e at most."""
_LARGEST_LOGIT = 100.0


@dataclass(frozen=True)
class PlackettLuce:
    beta: float  # log odds per standard deviation of the metric; above 0 where it points the right way
    sd: float  # sandwich, clustered by document
    log_bf10: float  # Savage-Dickey at beta = 0
    n_positions: int
    n_tied: int  # positions left out because two experts have the same loss change, so there is no order
    n_documents: int

    @property
    def bf10(self) -> float:
        """Infinite where it exceeds the largest float."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.log_bf10))


@dataclass(frozen=True)
class DocumentScores:
    document: Int[np.ndarray, " document"]
    log_score: Float[np.ndarray, " document"]  # log probability of all orders in the document (the mean), fitted to the others
    chance: Float[np.ndarray, " document"]  # the same with beta = 0


def standardised(score: Num[np.ndarray, "position slot"]) -> Float[np.ndarray, "position slot"]:
    """Less its mean within each position, over the root mean square of what remains. Do it layer by layer.

    Raises DegenerateSample where the score is constant within every position.
    """
    require_finite("score", score)
    table = np.asarray(score, np.float64)
    centred = table - table.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.mean(centred**2))
    if scale <= 1e-12 * np.abs(table).max():
        raise DegenerateSample("the score is the same for all experts at every position; it orders nothing")
    return centred / scale


def plackett_luce(
    score: Float[np.ndarray, "position slot"],
    delta: Num[np.ndarray, "position slot"],
    document: Int[np.ndarray, " position"],
    prior_sd: float = PRIOR_SD,
) -> PlackettLuce:
    """Fit beta by Newton's method; `score` should be `standardised`, `delta` is the loss change in nats.

    The standard deviation lets the positions of a document be as alike as they are. The Bayes factor is prior over
    posterior density at 0, with prior N(0, prior_sd^2) and the normal likelihood of the estimate with that standard
    deviation: reliable where documents are many.

    Raises ValueError for NaN, DegenerateSample for fewer than three documents, for a score without variance, and where
    it predicts the orders so well that beta has no finite estimate.
    """
    return fit_choices(score, delta, document).model(prior_sd)


def leave_one_document_out(
    score: Float[np.ndarray, "position slot"],
    delta: Num[np.ndarray, "position slot"],
    document: Int[np.ndarray, " position"],
) -> DocumentScores:
    """How probable each document's orders are under the beta of all other documents; errors as `plackett_luce`.

    Beta without a document is a step from the beta of all, by the first three derivatives of the others' log probability:
    the time is that of one fit, whatever the number of documents, and what is neglected is of third order in 1 / documents.
    """
    return fit_choices(score, delta, document).held_out()


@dataclass(frozen=True)
class ChoiceFit:
    """The beta of all orders, and what `plackett_luce` and `leave_one_document_out` take of it."""

    beta: float
    ordered: Float[np.ndarray, "untied slot"]  # scores, dearest expert first
    document: Int[np.ndarray, " untied"]
    gradient: Float[np.ndarray, " untied"]  # of the log likelihood in beta
    information: Float[np.ndarray, " untied"]  # less its second derivative
    skew: Float[np.ndarray, " untied"]  # less its third
    n_tied: int

    def model(self, prior_sd: float = PRIOR_SD) -> PlackettLuce:
        """As `plackett_luce`."""
        _, gradient = cluster_sums(self.document, self.gradient)
        documents = len(gradient)
        variance = float(np.sum(gradient**2) * documents / (documents - 1) / self.information.sum() ** 2)
        if variance == 0:
            raise DegenerateSample("beta fits every document equally well; its clustered error is 0")
        log_bf10 = _savage_dickey(self.beta, variance, prior_sd**2)
        return PlackettLuce(self.beta, float(np.sqrt(variance)), log_bf10, len(self.ordered), self.n_tied, documents)

    def held_out(self) -> DocumentScores:
        """As `leave_one_document_out`."""
        names, index = np.unique(self.document, return_inverse=True)
        gradient, information, skew = (np.bincount(index, x) for x in (self.gradient, self.information, self.skew))
        others = information.sum() - information
        if others.min() <= 1e-12 * information.sum():
            raise DegenerateSample("one document holds all the variance of the score; the others cannot predict it")
        newton = -gradient / others  # the gradient of all is 0, so that of the others is less the document's
        beta = self.beta + newton - (skew.sum() - skew) * newton**2 / (2 * others)
        log_score = np.bincount(index, _terms(beta[index], self.ordered)[0])
        slots = self.ordered.shape[1]
        return DocumentScores(names, log_score, -np.bincount(index) * float(scipy.special.gammaln(slots + 1)))


def fit_choices(
    score: Float[np.ndarray, "position slot"], delta: Num[np.ndarray, "position slot"], document: Int[np.ndarray, " position"]
) -> ChoiceFit:
    """Newton's method, once for both questions; arguments and errors as `plackett_luce`."""
    require_finite("score", score)
    require_finite("delta", delta)
    if score.shape != delta.shape or len(score) != len(document):
        raise ValueError(f"score {score.shape}, delta {delta.shape} and document {document.shape} must share their positions")
    order = np.argsort(-delta, axis=1, kind="stable")
    falling = np.take_along_axis(delta, order, axis=1)
    untied = (falling[:, 1:] < falling[:, :-1]).all(axis=1)
    ordered = np.take_along_axis(np.asarray(score, np.float64), order, axis=1)[untied]
    documents = len(np.unique(document[untied]))
    if documents < MINIMUM_PAIRS:
        raise DegenerateSample(f"{documents} documents with an order; clustered inference needs at least {MINIMUM_PAIRS}")

    beta, largest = 0.0, np.ptp(ordered, axis=1).max()
    for _ in range(100):
        _, gradient, information, skew = _terms(np.full(len(ordered), beta), ordered)
        if not information.sum() > 1e-12 * len(ordered) * largest**2 or abs(beta) * largest > _LARGEST_LOGIT:
            reason = "is constant at every position" if largest == 0 else "predicts the orders (almost) without fail"
            raise DegenerateSample(f"no finite beta: the score {reason}")
        step = gradient.sum() / information.sum()
        if abs(step) * largest < 1e-10:
            return ChoiceFit(beta, ordered, document[untied], gradient, information, skew, int((~untied).sum()))
        beta += float(np.clip(step, -2 / largest, 2 / largest))  # concave, but flat far out: no step may overshoot there
    raise DegenerateSample(f"Newton's method did not settle in 100 steps (beta={beta:g}); the score may separate the orders")


def _terms(
    beta: Float[np.ndarray, " position"], ordered: Float[np.ndarray, "position slot"]
) -> tuple[Float[np.ndarray, " position"], ...]:
    """Log probability of each position's order, its first derivative in beta, and less its second and third.

    The mean of the dearest-first choice and of the cheapest-first, in which beta, and with it every odd derivative, turns.
    """
    dearest, cheapest = _from_the_top(beta, ordered), _from_the_top(-beta, ordered[:, ::-1])
    return tuple((a + sign * b) / 2 for a, b, sign in zip(dearest, cheapest, (1, -1, 1, -1), strict=True))


def _from_the_top(
    beta: Float[np.ndarray, " position"], ordered: Float[np.ndarray, "position slot"]
) -> tuple[Float[np.ndarray, " position"], ...]:
    """The same for one direction of choice: slots are gone through from the last chosen, whose rivals are those after it."""
    columns = np.ascontiguousarray(ordered.T)
    utility = columns * beta
    utility -= utility.max(axis=0)
    left, first, second, third = (np.zeros(len(ordered)) for _ in range(4))  # sums of weight x score^0 to 3 over those left
    terms = [np.zeros(len(ordered)) for _ in range(4)]
    for score, own in zip(columns[::-1], utility[::-1], strict=True):
        weight = np.exp(own)
        for total in (left, first, second, third):
            total += weight
            weight *= score
        mean, square = first / left, second / left
        variance = square - mean**2
        terms[0] += own - np.log(left)
        terms[1] += score - mean
        terms[2] += variance
        terms[3] += third / left - mean * (3 * square - 2 * mean**2)  # third cumulant
    return tuple(terms)


def _savage_dickey(estimate: float, variance: float, prior_variance: float) -> float:
    posterior_variance = 1 / (1 / variance + 1 / prior_variance)
    posterior_mean = estimate * posterior_variance / variance
    return float((np.log(posterior_variance / prior_variance) + posterior_mean**2 / posterior_variance) / 2)
