"""What a check says: that it passed, that it does not apply, or what was got and where to look."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckOutcome:
    """A check that did not fail.

    Attributes:
        applies: whether there was something to check.
        detail: what was compared, or why the check does not apply to this model.
    """

    applies: bool
    detail: str


class CheckFailed(AssertionError):
    """A model breaks the contract. The message says what was got, what was expected and where to look.

    Attributes:
        got: what the model, or a part of it, did.
        expected: what it should have done.
        look_at: where the mistake usually is.
    """

    def __init__(self, got: str, expected: str, look_at: str) -> None:
        super().__init__(f"got {got}; expected {expected}; look at {look_at}")
        self.got, self.expected, self.look_at = got, expected, look_at


class DoesNotApply(Exception):
    """Raised inside of a check that this model has nothing for; its text is the outcome's detail."""


def require(condition: bool, got: str, expected: str, look_at: str) -> None:
    """Raise `CheckFailed` unless the condition holds."""
    if not condition:
        raise CheckFailed(got, expected, look_at)
