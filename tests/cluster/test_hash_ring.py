"""The ring of consistent hashes."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.cluster.hash_ring import HashRing, stable_hash

names = st.text(min_size=1, max_size=8)


def ring_of(members, weights=None):
    ring = HashRing()
    for member in members:
        ring.add(member, (weights or {}).get(member, 1.0))
    return ring


def first(ring, key):
    return next(iter(ring.walk(key)))


@given(st.sets(names, min_size=1, max_size=12), names)
@settings(max_examples=25)
def test_a_walk_meets_every_member_once(members, key):
    assert sorted(ring_of(members).walk(key)) == sorted(members)


def test_a_walk_of_an_empty_ring_meets_nobody():
    assert list(ring_of([]).walk("a")) == []


@given(st.sets(names, min_size=2, max_size=12), st.lists(names, min_size=1, max_size=30), st.data())
@settings(max_examples=25)
def test_removing_a_member_moves_only_its_own_keys(members, keys, data):
    gone = data.draw(st.sampled_from(sorted(members)))
    ring = ring_of(members)
    before = {key: list(ring.walk(key)) for key in keys}
    ring.remove(gone)
    for key in keys:
        assert list(ring.walk(key)) == [member for member in before[key] if member != gone]


@given(st.sets(names, min_size=1, max_size=12), names, st.lists(names, min_size=1, max_size=30))
@settings(max_examples=25)
def test_a_new_member_takes_keys_and_moves_none_between_others(members, new, keys):
    ring = ring_of(members - {new} or {"other"})
    before = {key: first(ring, key) for key in keys}
    ring.add(new)
    assert all(first(ring, key) in (before[key], new) for key in keys)


def test_the_order_of_adding_does_not_matter():
    members = [f"replica-{i}" for i in range(20)]
    one, other = ring_of(members), ring_of(reversed(members))
    assert all(list(one.walk(f"k{i}")) == list(other.walk(f"k{i}")) for i in range(50))


def test_shares_follow_weights():
    members = [f"replica-{i}" for i in range(10)]
    ring = ring_of(members, {"replica-0": 4.0})
    counts = Counter(first(ring, f"adapter-{i}") for i in range(20_000))
    mean = 20_000 / 13
    assert counts["replica-0"] == pytest.approx(4 * mean, rel=0.35)
    assert all(counts[member] == pytest.approx(mean, rel=0.6) for member in members[1:])


def test_a_member_added_twice_and_one_removed_that_is_unknown():
    ring = ring_of(["a", "a", "b"])
    ring.remove("c")
    assert len(ring) == 2 and sorted(ring.walk("x")) == ["a", "b"]


def test_hashes_are_the_same_in_every_process_and_take_any_text():
    assert stable_hash("adapter") == 12_170_483_732_856_461_936
    stable_hash("\ud800")
