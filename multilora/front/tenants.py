"""Who a request is for, when requests compete: the one place that says so. No header or field of a client is trusted,
but its key.

With `--auth-file` each key has its tenant. With `--api-key` all clients are one tenant. Without keys each adapter is
one, so that whoever floods the server through one adapter does not keep the users of another one waiting. The policy
`fair` knows adapters within a tenant as well.
"""

from multilora.config import Config
from multilora.front.access import Caller
from multilora.front.adapter_spec import AdapterSpec


def tenant_of(config: Config, caller: Caller, adapters: AdapterSpec) -> str:
    """The tenant of a request for these adapters. "" is the one of `--api-key`, of an admin beside tenants,
    and of the base model without keys.

    A composition counts for the first of its adapters by name: else each new mixture would be a new tenant.
    """
    if caller.tenant.name:
        return caller.tenant.name
    if config.api_key is not None or config.auth_file is not None or not adapters:
        return ""
    return min(name for name, _ in adapters)
