"""How figures of several seeds are written: mean and spread, and differences in pairs with their 95 % interval."""

from collections.abc import Sequence
from statistics import mean, stdev

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # seeds: t(.975)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences, and half their 95 % interval by Student's t; starred if it is without 0."""
    if len(differences) not in STUDENT:
        return f"{mean(differences):+.1f}" if differences else ""
    half = STUDENT[len(differences)] * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.1f} ± {half:.1f}" + (" *" if abs(mean(differences)) > half else "")
