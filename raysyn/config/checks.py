"""Checks of values: each raises UserError that names the key of `owner` and what it may be."""

from __future__ import annotations

from raysyn.types import UserError

INF = float("inf")
MAX_SEED = 2**31


def one_of(owner: object, **allowed: tuple[str, ...]) -> None:
    """key=choices: the value is one of them."""
    for key, choices in allowed.items():
        value = getattr(owner, key)
        if value not in choices:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")


def within(owner: object, **bounds: tuple[float, float]) -> None:
    """key=(low, high), both included; None is allowed, NaN is not."""
    for key, (low, high) in bounds.items():
        value = getattr(owner, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key}: {value} is outside [{low:g}, {high:g}]")


def each_within(owner: object, **bounds: tuple[float, float]) -> None:
    """key=(low, high), both included, for each value of a list."""
    for key, (low, high) in bounds.items():
        for value in getattr(owner, key):
            if not low <= value <= high:
                raise UserError(f"{key}: {value} is outside [{low:g}, {high:g}]")


def not_empty(owner: object, *keys: str) -> None:
    """The list or text of each key holds something."""
    for key in keys:
        if not getattr(owner, key):
            raise UserError(f"{key}: is empty; name at least one")


def rising(owner: object, low: str, high: str) -> None:
    """The value of the key `low` is not above that of `high`; None in either is allowed."""
    least, most = getattr(owner, low), getattr(owner, high)
    if least is not None and most is not None and least > most:
        raise UserError(f"{low}: {least} is above {high} {most}")
