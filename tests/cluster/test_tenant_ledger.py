"""What tenants have been served by all replicas."""

from hypothesis import given
from hypothesis import strategies as st

from multilora.cluster import tenant_ledger
from multilora.cluster.tenant_ledger import TenantLedger


def test_each_hears_what_the_others_have_served_since_it_first_asked():
    ledger = TenantLedger()
    assert ledger.exchange("a", {"acme": 10.0}) == {}
    assert ledger.exchange("b", {"acme": 1.0, "zoo": 5.0}) == {}  # it is new: what was before is not its business
    assert ledger.exchange("a", {}) == {"acme": 1.0, "zoo": 5.0}
    assert ledger.exchange("a", {"zoo": 2.0}) == {}
    assert ledger.exchange("b", {}) == {"zoo": 2.0}


def test_a_replica_that_is_gone_is_forgotten_and_what_it_has_served_is_not():
    ledger = TenantLedger()
    ledger.exchange("a", {})
    ledger.exchange("b", {})
    ledger.exchange("b", {"acme": 3.0})
    ledger.keep({"a"})
    assert list(ledger._told) == ["a"]
    assert ledger.exchange("a", {}) == {"acme": 3.0}


def test_tenants_that_all_have_heard_of_are_forgotten(monkeypatch):
    monkeypatch.setattr(tenant_ledger, "MAX_TENANTS", 3)
    ledger = TenantLedger()
    ledger.exchange("b", {})
    for i in range(10):
        ledger.exchange("a", {f"t{i}": 1.0})
        assert ledger.exchange("b", {}) == {f"t{i}": 1.0}
    assert len(ledger._total) <= 4


@given(st.lists(st.tuples(st.integers(0, 3), st.dictionaries(st.sampled_from("xyz"), st.integers(1, 9)))))
def test_everybody_knows_the_same_sum_in_the_end(steps):
    ledger, known = TenantLedger(), [{"x": 0.0, "y": 0.0, "z": 0.0} for _ in range(4)]
    for replica in range(4):
        ledger.exchange(str(replica), {})
    for replica, served in [*steps, *((i, {}) for i in range(4))]:
        for part in (served, ledger.exchange(str(replica), served)):
            for name, service in part.items():
                known[replica][name] += service
    assert all(one == known[0] for one in known)
