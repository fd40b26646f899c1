"""What an engine's environment says about waiting threads."""

import pytest

from multilora.engine.process.openmp import SPINS, environment


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def test_threads_that_wait_sleep_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    found = environment()
    assert found["GOMP_SPINCOUNT"] == str(SPINS) and found["KEPT"] == "1"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_what_somebody_has_set_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    found = environment()
    assert found[name] == value
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(found) == {name}
