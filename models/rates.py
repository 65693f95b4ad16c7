"""Keep rates: the shares of the original patch tokens that are left after each stage."""

from collections.abc import Sequence


def geometric_keep_rates(base_rate: float, num_stages: int, fewest: float = 0.0) -> tuple[float, ...]:
    """base_rate, base_rate^2, ... (paper, section 4.1), but no stage keeps less than the share fewest.

    Raises ValueError for a base rate that is no share.
    """
    if not 0 < base_rate <= 1:
        raise ValueError(f"keep rates must lie in (0, 1], got base rate {base_rate}")
    return tuple(max(fewest, base_rate ** (stage + 1)) for stage in range(num_stages))


def arithmetic_keep_rates(base_rate: float, num_stages: int) -> tuple[float, ...]:
    """base_rate, base_rate - 0.2, base_rate - 0.4, ... as published; ValueError where that leaves (0, 1]."""
    return check_keep_rates([base_rate - 0.2 * stage for stage in range(num_stages)], num_stages)


def check_keep_rates(keep_rates: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Plain floats. Raises ValueError unless they fit the stages, lie in (0, 1] and do not grow."""
    rates = as_rates(keep_rates, num_stages)
    if list(rates) != sorted(rates, reverse=True):
        raise ValueError(f"keep rates are shares of the original tokens and cannot grow, got {rates}")
    return rates


def as_rates(keep_rates: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """As check_keep_rates, of rates that may grow."""
    try:
        rates = tuple(float(rate) for rate in keep_rates)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"keep_rates needs a share of all tokens for each of {num_stages} stages, got {keep_rates}"
        ) from error
    if len(rates) != num_stages:
        raise ValueError(f"{len(rates)} keep rates for {num_stages} pruning stages")
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"keep rates must lie in (0, 1], got {', '.join(map(str, rates))}")
    return rates
