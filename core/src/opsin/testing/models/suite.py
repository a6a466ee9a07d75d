"""The list of checks, and how one is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opsin.errors import OpsinError
from opsin.testing.models import check_answers, check_config, check_inputs, check_layers
from opsin.testing.models.outcome import CheckFailed, CheckOutcome, DoesNotApply
from opsin.testing.models.subject import ModelUnderTest


@dataclass(frozen=True)
class ModelCheck:
    """One thing that every model does. Its string is its name, stable across runs.

    Attributes:
        name: of the check.
        promise: what is checked, in a sentence.
        quick: whether it is among the few that also run on a checkpoint of full size.
    """

    name: str
    promise: str
    quick: bool
    run: Callable[[ModelUnderTest], str] = field(repr=False)

    def __str__(self) -> str:
        return self.name


_QUICK: dict[str, Callable[[ModelUnderTest], str]] = {
    "spec": check_inputs.spec,
    "weights": check_layers.weights,
    "mapper-types": check_inputs.mapper_types,
    "mapper-repeats": check_inputs.mapper_repeats,
    "mapper-sizes": check_inputs.mapper_sizes,
    "placeholder": check_inputs.placeholder,
    "positions": check_inputs.positions,
    "chat": check_inputs.chat,
    "encoder": check_layers.encoder,
    "encoder-neighbours": check_layers.neighbours,
    "head": check_layers.head,
    "order": check_answers.order,
    "batched": check_answers.batched,
    "embeddings": check_answers.embeddings,
}
_THOROUGH: dict[str, Callable[[ModelUnderTest], str]] = {
    "chunked": check_answers.chunked,
    "cached": check_answers.cached,
    "small-caches": check_answers.small_caches,
    "preempted": check_answers.preempted,
    "other-dtypes": check_layers.half_precision,
    "two-ranks": check_layers.two_ranks,
    "config-fields": check_config.config_fields,
}


def model_checks(*, quick: bool = False) -> list[ModelCheck]:
    """All checks; ``quick``: those that a checkpoint of full size passes in a short time."""
    chosen = _QUICK if quick else {**_QUICK, **_THOROUGH}
    return [
        ModelCheck(name, (run.__doc__ or "").strip().partition("\n")[0], name in _QUICK, run)
        for name, run in chosen.items()
    ]


def check_model(check: ModelCheck, model: ModelUnderTest) -> CheckOutcome:
    """Run one check.

    Args:
        check: from `model_checks`.
        model: the model under test.

    Returns:
        What was compared; or that the check does not apply to this model, and why. A plugin's tests may hold
        ``applies`` against what the family is known to have.

    Raises:
        CheckFailed: the model breaks the contract; an AssertionError whose message says what was got, what
            was expected and where to look.
    """
    try:
        return CheckOutcome(True, check.run(model))
    except DoesNotApply as reason:
        return CheckOutcome(False, str(reason))
    except CheckFailed:
        raise
    except OpsinError as error:
        raise CheckFailed(
            f"{type(error).__name__}: {error}", check.promise, "what the message names"
        ) from error
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}", check.promise, "the traceback above") from error
