"""Stands in until the fused kernels land."""


def available(x) -> bool:
    return False
