"""`opsin.lru`: the budget holds, pins hold, the least recently used goes first."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.lru import ByteLRU


def test_the_least_recently_used_entry_goes_first() -> None:
    lru: ByteLRU[str] = ByteLRU(30)
    for key in "abc":
        assert lru.put(key, key.upper(), 10)
    assert lru.get("a") == "A"
    assert lru.put("d", "D", 10)
    assert [key in lru for key in "abcd"] == [True, False, True, True]
    assert lru.get("b") is None
    assert (lru.queries, lru.hits) == (2, 1)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    lru: ByteLRU[str] = ByteLRU(30)
    lru.put("a", "A", 10)
    lru.put("b", "B", 10, pin=True)
    assert not lru.put("c", "C", 21)
    assert "a" in lru
    assert "b" in lru
    assert lru.num_bytes == 20
    assert lru.put("c", "C", 20)
    assert "a" not in lru


def test_pins_count() -> None:
    lru: ByteLRU[str] = ByteLRU(10)
    lru.put("a", "A", 10, pin=True)
    assert lru.pin("a")
    lru.unpin("a")
    assert lru.pinned_bytes == 10
    assert not lru.put("b", "B", 1)
    lru.clear()
    assert "a" in lru
    lru.unpin("a")
    assert lru.put("b", "B", 1)
    assert "a" not in lru
    assert not lru.pin("a")
    with pytest.raises(KeyError):
        lru.unpin("b")


def test_replacing_an_entry_keeps_its_pins_and_counts_its_bytes_once() -> None:
    lru: ByteLRU[str] = ByteLRU(10)
    lru.put("a", "A", 8, pin=True)
    assert lru.put("a", "AA", 4)
    assert (lru.num_bytes, lru.pinned_bytes, len(lru)) == (4, 4, 1)
    assert lru.get("a") == "AA"


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "pin", "unpin", "get"]), st.integers(0, 5), st.integers(0, 12))
    )
)
def test_budget_and_pins_hold_whatever_happens(operations: list[tuple[str, int, int]]) -> None:
    lru: ByteLRU[int] = ByteLRU(20)
    pins: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for name, number, size in operations:
        key = str(number)
        if name == "put" and lru.put(key, number, size):
            sizes[key] = size
        elif name == "pin" and lru.pin(key):
            pins[key] += 1
        elif name == "unpin" and pins[key]:
            lru.unpin(key)
            pins[key] -= 1
        elif name == "get":
            assert lru.get(key) == (number if key in lru else None)
        assert all(key in lru for key, count in pins.items() if count)
        assert lru.num_bytes == sum(sizes[key] for key in sizes if key in lru) <= 20
