"""Whose fault it is that nothing can be sampled."""

import pytest

from multilora.engine.faults import NONE_ALLOWED, NOT_FINITE, kind_of
from multilora.errors import AdapterInvalid, BadRequest, MultiloraError, from_wire


@pytest.mark.parametrize(
    ("fault", "adapted", "error"),
    [
        (NOT_FINITE, False, MultiloraError),
        (NOT_FINITE, True, AdapterInvalid),
        (NONE_ALLOWED, False, BadRequest),
        (NONE_ALLOWED, True, BadRequest),
    ],
)
def test_a_fault_is_the_clients_the_adapters_or_the_models(fault, adapted, error):
    made = from_wire(kind_of(fault, adapted=adapted), fault)
    assert type(made) is error and made.message == fault
