"""Layouts of ready-made picture embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.layers import split_image_embeds


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(24.0).view(2, 3, 4),
        list(torch.arange(24.0).view(2, 3, 4)),
        list(torch.arange(24.0).view(2, 1, 3, 4)),
        torch.arange(24.0).view(6, 4),
        torch.arange(24.0).view(2, 3, 4).numpy(),
        {"image_embeds": torch.arange(24.0).view(2, 3, 4)},
    ],
    ids=["tensor", "list", "list of batches", "flat", "array", "dict"],
)
def test_pictures_are_taken_apart(data: Any) -> None:
    items = split_image_embeds(data, 3)
    assert torch.equal(torch.stack(items), torch.arange(24.0).view(2, 3, 4))


def test_pictures_may_have_different_numbers_of_rows() -> None:
    items = split_image_embeds([torch.zeros(3, 4), torch.ones(5, 4)])
    assert [tuple(item.shape) for item in items] == [(3, 4), (5, 4)]
    assert [tuple(item.shape) for item in split_image_embeds(torch.zeros(7, 4))] == [(7, 4)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"embeds": torch.zeros(3, 4)},
            r"got a dict; expected a tensor or a list of tensors",
        ),
        ([torch.zeros(3, 4), "picture"], "got a list"),
        (torch.zeros(2, 5, 4), r"shape \(5, 4\), expected \(3, hidden\)"),
        (torch.zeros(4), r"shape \(4,\)"),
        (torch.zeros(1, 2, 3, 4), r"shape \(1, 2, 3, 4\)"),
        (torch.zeros(3, 4).to_sparse(), "dense"),
    ],
)
def test_other_layouts_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_image_embeds(data, 3)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(features, hidden\)"):
        split_image_embeds(torch.zeros(0, 4))
