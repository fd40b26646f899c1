"""The loaded adapters as operator and tenants see them."""

from multilora.engine.messages import AdapterInfo
from multilora.front.access import Tenant, acting_for
from multilora.front.adapter_view import seen_adapters, seen_paths
from multilora.front.registry import AdapterRegistry

ACME, ZORG = Tenant("acme"), Tenant("zorg")


def info(version: int) -> AdapterInfo:
    return AdapterInfo(version=version, path="p", rank=8, target_modules=["q_proj"], nbytes=1, pages=1)


def registry() -> AdapterRegistry:
    found = AdapterRegistry("base", enabled=True)
    found.tenants = {"acme": ACME, "zorg": ZORG}
    for name in ("sql", "chat", "acme:sql", "zorg:secret", "acme:x"):
        version = found.begin_load(name, f"/files/{name}")
        found.commit_load(version, info(version))
    with acting_for(ACME):
        found.compose("acme:mix", (("sql", 2.0), ("x", 1.0), ("chat", 1.0)))
    return found


def test_the_operator_sees_all_by_their_full_names():
    paths = seen_paths(registry())
    assert list(paths) == ["sql", "chat", "acme:sql", "zorg:secret", "acme:x", "acme:mix"]
    assert paths["acme:sql"] == "/files/acme:sql"
    assert paths["acme:mix"] == "2 * acme:sql + acme:x + chat"


def test_a_tenant_sees_its_own_and_the_operators_and_only_its_own_paths():
    names = registry()
    with acting_for(ACME):
        assert seen_paths(names) == {
            "sql": "/files/acme:sql",
            "chat": "chat",
            "x": "/files/acme:x",
            "mix": "2 * sql + x + chat",
        }
        assert next(iter(seen_adapters(names))).ref.name == "acme:sql"
    with acting_for(ZORG):
        assert seen_paths(names) == {"sql": "sql", "chat": "chat", "secret": "/files/zorg:secret"}
