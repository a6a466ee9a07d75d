"""The byte-budgeted map against a slow and obvious one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opsin.inputs.cache import ByteLRU


def test_the_least_recently_used_entry_goes_first() -> None:
    cache: ByteLRU[str] = ByteLRU(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 3)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert (cache.queries, cache.hits) == (5, 4)


def test_what_can_never_fit_is_refused_and_changes_nothing() -> None:
    cache: ByteLRU[int] = ByteLRU(10)
    assert cache.put("a", 1, 10)
    assert not cache.put("b", 2, 11)
    assert cache.get("a") == 1


@given(st.lists(st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 6), st.integers(0, 12))))
def test_it_holds_what_an_obvious_one_holds(operations: list[tuple[str, int, int]]) -> None:
    cache: ByteLRU[int] = ByteLRU(20)
    newest_last: list[tuple[str, int, int]] = []
    for place, (operation, number, size) in enumerate(operations):
        key = str(number)
        known = next((entry for entry in newest_last if entry[0] == key), None)
        if operation == "put":
            cache.put(key, place, size)
            newest_last = [entry for entry in newest_last if entry[0] != key] + [(key, place, size)]
            while sum(entry[2] for entry in newest_last) > 20:
                newest_last.pop(0)
        else:
            assert cache.get(key) == (known[1] if known else None)
            if known:
                newest_last.remove(known)
                newest_last.append(known)
        assert cache.num_bytes == sum(entry[2] for entry in newest_last) <= 20
        assert len(cache) == len(newest_last)
