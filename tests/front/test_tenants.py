from multilora.config import Config
from multilora.front.access import OPERATOR, Caller, Tenant
from multilora.front.tenants import tenant_of


def test_each_adapter_is_a_tenant_without_keys() -> None:
    config = Config()
    assert tenant_of(config, OPERATOR, ()) == ""
    assert tenant_of(config, OPERATOR, (("a", 1.0),)) == "a"


def test_no_mixture_makes_a_new_tenant() -> None:
    mixtures = [(("b", weight), ("a", 1.0)) for weight in (0.1, 0.2, 0.3)]
    assert {tenant_of(Config(), OPERATOR, mixture) for mixture in mixtures} == {"a"}


def test_all_who_know_the_key_are_one_tenant() -> None:
    config = Config(api_key="k")
    assert tenant_of(config, OPERATOR, (("a", 1.0),)) == tenant_of(config, OPERATOR, ()) == ""


def test_a_key_says_its_tenant() -> None:
    caller = Caller(key_id="k", tenant=Tenant("acme"))
    config = Config(auth_file="keys.toml")
    assert {tenant_of(config, caller, adapters) for adapters in ((), (("a", 1.0),))} == {"acme"}
    assert tenant_of(config, OPERATOR, (("a", 1.0),)) == ""
