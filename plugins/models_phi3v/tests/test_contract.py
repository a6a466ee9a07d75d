"""The family through opsin's contract suite, on the recorded tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.testing.models import ModelCheck, ModelUnderTest, check_model, model_checks

FOLDER = Path(__file__).parents[3] / "tests" / "golden" / "phi3v" / "model"
UNREAD = {
    "_note_tiny": "a remark",
    "vision_config.projection_dim": "of CLIP's head over both towers, which is not stored",
}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelUnderTest]:
    with ModelUnderTest(FOLDER, unread=UNREAD, num_requests=8) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies
