"""``OPSIN_TEST_RANKS=2``: the tests of this folder with so many tensor-parallel ranks (`make test-ranks`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from opsin import LLM

RANKS = int(os.environ.get("OPSIN_TEST_RANKS", "1"))


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    if RANKS == 1:
        yield
        return
    init = LLM.__init__

    def with_ranks(self: LLM, *args: Any, **settings: Any) -> None:
        alone = settings.get("plugins") is not None  # which ranks, being processes, would not know
        init(self, *args, **{"tensor_parallel_size": 1 if alone else RANKS, **settings})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "__init__", with_ranks)
        yield
