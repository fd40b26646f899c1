"""The resolver: where a name may lead, and the flights, failures and quotas of those who ask."""

import posixpath
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from multilora.errors import AdapterError, AdapterInvalid, ConfigError, MultiloraError, QueueFull, UnknownAdapter
from multilora.front.resolver import (
    Location,
    Resolutions,
    ResolverLimits,
    ResolverRules,
    Start,
    Wait,
    is_plain_path,
    unknown,
)

# ---------------------------------------------------------------------- rules


def test_places_come_in_their_order_and_the_hub_last():
    rules = ResolverRules(["/one", "s3://bucket/two/", "three/"], ["org/*"])
    assert rules.locations("org/name") == [
        Location("directory", "/one/org/name", "/one"),
        Location("remote", "s3://bucket/two/org/name"),
        Location("directory", "three/org/name", "three/"),
        Location("hub", "hf://org/name"),
    ]
    assert [location.kind for location in rules.locations("name")] == ["directory", "remote", "directory"]


def test_without_places_nothing_is_resolved():
    assert not ResolverRules()
    assert ResolverRules().locations("name") == []
    assert ResolverRules(["/one"]) and ResolverRules((), ["org/*"])


@pytest.mark.parametrize(
    "place", ["", "file:///x", "memory://x", "zip://a::s3://b/c", "s3://b/c::x", "s3://", "http://h/x?y", "ftp://h/x"]
)
def test_other_urls_are_no_places(place):
    with pytest.raises(ConfigError, match="--lora-resolver-dir"):
        ResolverRules([place])


@pytest.mark.parametrize(
    "pattern", ["", "*", "org", "org/", "/x", "a/b/c", "org/[ab]", "org/**/x", "org/a b", "örg/x"]
)
def test_a_hub_pattern_is_org_and_name(pattern):
    with pytest.raises(ConfigError, match="--lora-resolver-hub"):
        ResolverRules((), [pattern])


@pytest.mark.parametrize(
    ("pattern", "name", "allowed"),
    [
        ("org/*", "org/name", True),
        ("org/*", "org/na.me-1_x", True),
        ("org/*", "Org/name", False),
        ("org/*", "org2/name", False),
        ("org/*", "org/a/b", False),
        ("org/*", "org", False),
        ("org/*", "org/name@main", False),  # a stranger's pull request is a revision too
        ("org/*", "org/name@refs/pr/1", False),
        ("org/*@v*", "org/name@v1", True),
        ("org/*@v*", "org/name@refs/pr/1", False),
        ("org/*@v*", "org/name@v/../refs/pr/1", False),
        ("org/lora-?", "org/lora-7", True),
        ("org/lora-?", "org/lora-77", False),
        ("o.g/x", "oxg/x", False),
        ("*/*", "any/thing", True),
        ("org/*", "org/näme", False),
        ("org/*", "org/name\n", False),
    ],
)
def test_which_names_a_hub_pattern_allows(pattern, name, allowed):
    assert [x.path for x in ResolverRules((), [pattern]).locations(name)] == ([f"hf://{name}"] if allowed else [])


NAMES = ["a", "policy-v12", "org/name", "a b", "ünïcode", "日本", "a~", "~root", "a.b", "a@b", "x" * 255]
NAMES.append("a/" * 7 + "b")
NO_NAMES = [
    "",
    ".",
    "..",
    "a/..",
    "../a",
    "a/../b",
    "/a",
    "a/",
    "a//b",
    ".hidden",
    "a/.tmp",
    "a\\b",
    "a\0",
    "a\nb",
    "\u202ea",  # right-to-left override
    "a\u200b",  # no width
    "\ud800",
    " a",
    "a /b",
    "u\u0308",  # the long spelling of ü
    "é" * 128,  # 256 bytes
    "x" * 257,
    "a/" * 8 + "b",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_plain_paths(name):
    assert is_plain_path(name)


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name[:30]))
def test_names_that_are_not_even_looked_for(name):
    assert not is_plain_path(name)
    assert ResolverRules(["/root", "s3://bucket/x", "https://host/x"], ["*/*"]).locations(name) == []


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%2e%2e", "a*", "a[0]", "ünïcode", "a b", "~root", "-a"])
def test_what_means_something_else_in_a_url_is_looked_for_in_directories_only(name):
    rules = ResolverRules(["/root", "https://host/x", "s3://bucket"])
    assert [location.kind for location in rules.locations(name)] == ["directory"]


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "a", "", "~", "b.c"]), max_size=9).map("/".join))
@example("a/../../b")
def test_no_name_leaves_its_place_by_its_form(name):
    for location in ResolverRules(["/root/dir", "s3://bucket/dir"], ["*/*"]).locations(name):
        head, _, tail = location.path.rpartition("://")
        inside = {"directory": "/root/dir/", "remote": "bucket/dir/", "hub": ""}[location.kind]
        assert posixpath.normpath(tail) == tail
        assert tail.startswith(inside) and len(tail) > len(inside)
        assert "\0" not in tail and unicodedata.normalize("NFC", tail) == tail
        assert head == {"directory": "", "remote": "s3", "hub": "hf"}[location.kind]


# ---------------------------------------------------------------------- flights

LIMITS = ResolverLimits(max_resolved=3, max_flights=2, time_limit=10, directory_ttl=1, remote_ttl=30, max_failures=4)


def resolutions(places=("/root",), hub=(), **changes):
    limits = {**{name: getattr(LIMITS, name) for name in LIMITS.__dataclass_fields__}, **changes}
    return Resolutions(ResolverRules(places, hub), ResolverLimits(**limits))


def resolve(state, *names, now=0.0):
    for name in names:
        assert isinstance(state.ask(name, now), Start)
        assert state.loaded(name)


def test_the_first_starts_and_the_others_wait():
    state = resolutions()
    assert state.ask("a", 5) == Start("a", (Location("directory", "/root/a", "/root"),), deadline=15)
    assert state.ask("a", 6) == Wait("a", deadline=15)
    assert state.in_flight == ("a",)
    assert state.loaded("a")
    assert (state.in_flight, state.resolved) == ((), ("a",))


def test_a_name_that_can_be_nowhere_starts_nothing_and_is_not_remembered():
    state = resolutions()
    for _ in range(100):
        with pytest.raises(UnknownAdapter, match="never been loaded") as caught:
            state.ask("../a", 0)
        assert caught.value.param == "model"
    assert state.in_flight == () and state._failures == {}


def test_a_failure_is_remembered_for_a_while_and_is_a_new_error_each_time():
    state = resolutions()
    state.ask("a", 0)
    state.failed("a", AdapterInvalid("adapter_config.json: broken"), 1)
    errors = []
    for now in (1, 1.9):
        with pytest.raises(AdapterInvalid, match="broken") as caught:
            state.ask("a", now)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert errors[0].param == "model"
    assert isinstance(state.ask("a", 2), Start)


def test_a_failure_that_cost_a_download_is_remembered_longer():
    state = resolutions(places=(), hub=("org/*",))
    state.ask("org/a", 0)
    state.failed("org/a", unknown("org/a"), 0)
    with pytest.raises(UnknownAdapter):
        state.ask("org/a", 29)
    assert isinstance(state.ask("org/a", 30), Start)


def test_success_after_a_failure_forgets_it():
    state = resolutions()
    state.ask("a", 0)
    state.failed("a", unknown("a"), 0)
    resolve(state, "a", now=1)
    assert state._failures == {}


def test_failures_are_bounded_and_the_oldest_goes_first():
    state = resolutions()
    for i in range(100):
        state.ask(f"a{i}", 0)
        state.failed(f"a{i}", unknown(f"a{i}"), 0)
    assert list(state._failures) == ["a96", "a97", "a98", "a99"]


def test_flights_are_bounded_and_those_who_wait_do_not_count():
    state = resolutions()
    state.ask("a", 0)
    state.ask("b", 0)
    assert isinstance(state.ask("a", 0), Wait)
    with pytest.raises(QueueFull, match="2 adapters are being looked for"):
        state.ask("c", 0)
    state.failed("a", unknown("a"), 0)
    assert isinstance(state.ask("c", 0), Start)


def test_a_flight_ends_when_its_time_is_over_and_a_late_load_is_undone():
    state = resolutions()
    state.ask("a", 0)
    state.ask("b", 5)
    assert state.next_deadline == 10
    assert state.overdue(9.9) == {}
    (error,) = state.overdue(10).values()
    assert isinstance(error, AdapterError) and "within 10 s" in error.message
    assert not state.loaded("a")  # too late
    assert state.resolved == ()
    with pytest.raises(AdapterError, match="within 10 s"):
        state.ask("a", 10.5)
    assert state.next_deadline == 15
    state.failed("a", unknown("a"), 10.5)  # too late as well: the first word stands
    with pytest.raises(AdapterError, match="within 10 s"):
        state.ask("a", 10.9)


def test_the_least_recently_used_goes_when_there_are_too_many():
    state = resolutions()
    resolve(state, "a", "b", "c")
    state.use("a")
    assert state.ask("d", 0).evict == ("b",)
    assert state.resolved == ("c", "a")
    assert state.ask("e", 0).evict == ("c",)


def test_a_busy_adapter_is_never_evicted():
    state = resolutions()
    resolve(state, "a", "b", "c")
    assert state.ask("d", 0, busy={"a", "b"}).evict == ("c",)
    with pytest.raises(QueueFull, match="all 3 resolved adapters are in use"):
        state.ask("e", 0, busy={"a", "b", "other"})
    assert state.resolved == ("a", "b")


def test_flights_count_as_resolved_before_they_land():
    state = resolutions(max_resolved=1)
    state.ask("a", 0)
    with pytest.raises(QueueFull):
        state.ask("b", 0)


def test_an_adapter_unloaded_by_hand_does_not_come_back_at_once():
    state = resolutions()
    resolve(state, "a")
    state.forget("a", 5)
    assert state.resolved == ()
    with pytest.raises(UnknownAdapter):
        state.ask("a", 5.9)
    assert isinstance(state.ask("a", 6), Start)
    state.forget("never asked for", 6)


def test_an_adapter_that_went_behind_our_back_is_looked_for_again():
    state = resolutions()
    resolve(state, "a")
    assert isinstance(state.ask("a", 0), Start)
    assert state.resolved == ()


def test_a_flight_whose_adapter_was_loaded_by_hand_leaves_no_trace():
    state = resolutions()
    state.ask("a", 0)
    state.dismiss("a")
    state.dismiss("b")
    assert (state.in_flight, state.resolved, state.next_deadline) == ((), (), None)
    assert isinstance(state.ask("a", 0), Start)


def test_use_of_other_adapters_is_none_of_its_business():
    state = resolutions()
    state.use("loaded by hand")
    assert state.resolved == ()


names = st.sampled_from([f"n{i}" for i in range(7)])


class Driver(RuleBasedStateMachine):
    """A driver that does everything in any order, beside a model of what the state has to be."""

    flights = Bundle("flights")

    @initialize()
    def start(self):
        self.state = resolutions()
        self.now = 0.0
        self.loaded: set[str] = set()  # in the engine, as far as the driver did what it was told
        self.deadlines: dict[str, float] = {}

    @rule(target=flights, name=names, busy=st.sets(names))
    def ask(self, name, busy):
        before = set(self.state.resolved)
        self.loaded.discard(name)  # who asks for it says that it is gone
        try:
            answer = self.state.ask(name, self.now, busy)
        except MultiloraError:
            return name
        if isinstance(answer, Wait):
            assert answer.deadline == self.deadlines[name]
        else:
            assert name not in self.deadlines
            assert set(answer.evict) <= before - busy - {name}
            self.loaded -= set(answer.evict)
            self.deadlines[name] = answer.deadline
        return name

    @rule(name=consumes(flights))
    def land(self, name):
        assert self.state.loaded(name) == (name in self.deadlines)
        if self.deadlines.pop(name, None) is not None:
            self.loaded.add(name)

    @rule(name=consumes(flights))
    def fail(self, name):
        self.state.failed(name, unknown(name), self.now)
        if self.deadlines.pop(name, None) is not None:
            with pytest.raises(UnknownAdapter):
                self.state.ask(name, self.now)

    @rule(seconds=st.sampled_from([0.1, 1, 7, 40]))
    def wait(self, seconds):
        self.now += seconds
        late = {name for name, deadline in self.deadlines.items() if deadline <= self.now}
        assert self.state.overdue(self.now).keys() == late
        for name in late:
            del self.deadlines[name]

    @rule(name=names)
    def use(self, name):
        self.state.use(name)
        if name in self.loaded:
            assert self.state.resolved[-1] == name

    @rule(name=names)
    def unload(self, name):
        self.state.forget(name, self.now)
        self.loaded.discard(name)

    @invariant()
    def bounds(self):
        flights, resolved = self.state.in_flight, self.state.resolved
        assert set(flights) == self.deadlines.keys()
        assert set(resolved) == self.loaded
        assert len(flights) <= LIMITS.max_flights
        assert len(flights) + len(resolved) <= LIMITS.max_resolved
        assert not set(flights) & set(resolved)
        assert len(self.state._failures) <= LIMITS.max_failures
        assert not self.state._failures.keys() & (set(flights) | set(resolved))
        assert self.state.next_deadline == min(self.deadlines.values(), default=None)


TestDriver = Driver.TestCase
TestDriver.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
