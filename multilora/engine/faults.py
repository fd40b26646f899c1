"""What can be wrong with one row of a step, so that nothing can be sampled from it, and whose fault that is."""

NOT_FINITE = "the model produced logits that are not finite"
NONE_ALLOWED = "no token is allowed by the grammar, logit_bias and min_new_tokens together"


def kind_of(fault: str, *, adapted: bool) -> str:
    """The class name of the error that the request ends with. adapted: whether adapters act in it, whose numbers are
    then taken for the cause."""
    if fault == NONE_ALLOWED:
        return "BadRequest"
    return "AdapterInvalid" if adapted else "MultiloraError"
