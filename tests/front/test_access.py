"""What a key may do with which adapter."""

import pytest

from multilora.front.access import CALLER, NOBODY, OPERATOR, Caller, Tenant, owner_of, shown

ACME = Caller(key_id="k", tenant=Tenant("acme"), use=("sql-*", "chat"), load=("sql-*",))


@pytest.mark.parametrize(
    ("name", "use", "load"),
    [
        ("sql-1", True, True),
        ("chat", True, False),
        ("chats", False, False),
        ("SQL-1", False, False),
        ("other:sql-1", False, False),
        ("acme:sql-1", False, False),
        ("sql-1:x", False, True),
    ],
)
def test_names(name, use, load):
    assert (ACME.may_use(name), ACME.may_load(name)) == (use, load)


def test_a_tenant_has_names_of_its_own():
    assert ACME.own_name("sql-1") == "acme:sql-1"
    assert ACME.shown("acme:sql-1") == "sql-1"
    assert ACME.shown("sql-1") == "sql-1"
    assert ACME.shown("acmes:sql-1") == "acmes:sql-1"
    assert [ACME.owns(name) for name in ("acme:a", "a", "acm:a", "other:acme:a")] == [True, False, False, False]
    assert [owner_of(name) for name in ("acme:a", "a")] == ["acme", ""]


def test_what_a_tenant_sees():
    names = ["acme:sql-1", "acme:chat", "acme:x", "sql-2", "x", "other:sql-1", "acmes:sql-1"]
    assert [name for name in names if ACME.sees(name)] == ["acme:sql-1", "acme:chat", "sql-2"]
    blind = Caller(key_id="k", tenant=Tenant("acme"), see=())
    assert not any(blind.sees(name) for name in names)
    assert all(OPERATOR.sees(name) for name in names)
    assert [name for name in names if NOBODY.sees(name)] == ["sql-2", "x"]


def test_without_keys_the_caller_is_the_operator():
    assert CALLER.get() is OPERATOR
    assert OPERATOR.own_name("a") == OPERATOR.shown("a") == shown("a") == "a"
    assert OPERATOR.may_use("acme:a")
    assert OPERATOR.may_load("acme:a")
    assert not NOBODY.may_load("a")
