"""How numbers are spelt on the page and on a console."""

import math
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def signed(value: float, digits: int) -> str:
    if math.isnan(value):
        return DASH
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text if any(digit in text for digit in "123456789") else text[1:]  # no sign on a zero


def interval(low: float, high: float, digits: int) -> str:
    return DASH if math.isnan(low) or math.isnan(high) else f"[{signed(low, digits)}, {signed(high, digits)}]"


LEAST_P, MOST_BAYES = 1e-10, 1e10
"""Beyond these a number says nothing that the bound does not: no model of the data is right to so many digits."""


def p_value(p: float) -> str:
    if math.isnan(p):
        return DASH
    if p < LEAST_P:
        return "<1e-10"
    return f"{p:.3f}" if p >= 0.001 else (f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}")


def share(value: float) -> str:
    """A share in percent, with a decimal where it is small."""
    if math.isnan(value):
        return DASH
    text = f"{100 * value:.{1 if abs(value) < 0.095 else 0}f}%".replace("-", MINUS)
    return text if any(digit in text for digit in "123456789") else text.removeprefix(MINUS)  # no sign on a zero


def preset_share(value: float) -> str:
    """A share that was chosen, not measured: "12.5%", "25%"."""
    return f"{100 * value:g}%"


def share_interval(low: float, high: float) -> str:
    return DASH if math.isnan(low) or math.isnan(high) else f"[{share(low)}, {share(high)}]"


def nats(value: float) -> str:
    """Nats without a sign on a positive value."""
    return DASH if math.isnan(value) else f"{value:.4f}".replace("-", MINUS)


def bayes_factor(value: float) -> str:
    """Two digits, or a power of ten beyond a thousand either way."""
    if math.isnan(value):
        return DASH
    return log_bayes_factor(math.log(value) if value > 0 else -math.inf)


def log_bayes_factor(value: float) -> str:
    """A Bayes factor given by its natural logarithm, which may be beyond what a float holds."""
    if math.isnan(value):
        return DASH
    if abs(value) > math.log(MOST_BAYES):
        return ">1e10" if value > 0 else "<1e-10"
    if abs(value) < math.log(1000):
        factor = math.exp(value)
        return f"{factor:.0f}" if factor >= 100 else f"{factor:.2g}"
    return f"1e{value / math.log(10):.0f}"


def layer_list(layers: list[int]) -> str:
    """ "layer 3", "layers 0-2 and 5": runs of three or more as a range."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}{DASH}{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("layer " if len(layers) == 1 else "layers ") + enumeration(parts)


def sentence_case(text: str) -> str:
    """The text with a capital first letter, to begin a sentence with a name."""
    return text[:1].upper() + text[1:]


def enumeration(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def value_text(value: Any) -> str:
    """A value of a table; numbers are rounded for reading."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return DASH
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2e}"
