"""Shares of a whole, as the person typed them."""

from fractions import Fraction


def exact_share(ratio: float) -> Fraction:
    """What the person typed: 0.1 means one tenth, so floor(0.1 * 30) is 3 whatever binary rounding says."""
    return Fraction(repr(float(ratio)))
