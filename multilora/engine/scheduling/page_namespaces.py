"""Which namespaces of the prefix cache a request's pages belong to: base, the page that activation falls into, and
the others. Held from when the request comes until it ends, or goes on with another version of its adapter.
"""

from dataclasses import dataclass

from multilora.adapters.composition.namespaces import Namespaces
from multilora.params import Composition


@dataclass(frozen=True)
class PageNamespaces:
    """By page: base, then `edge`, then the others."""

    base_pages: int = 0
    edge: int = 0
    rest: int = 0

    @classmethod
    def acquire(
        cls, namespaces: Namespaces, adapters: Composition, activation: int, page_size: int
    ) -> "PageNamespaces":
        """The namespace of a request whose adapters act from position `activation` on, until `release`."""
        base_pages, pre_activation = divmod(activation, page_size)
        edge, rest = (namespaces.acquire(adapters, n) for n in (pre_activation, 0))
        return cls(base_pages, edge, rest)

    @staticmethod
    def release(namespaces: Namespaces, adapters: Composition, activation: int, page_size: int) -> None:
        namespaces.release(adapters, activation % page_size)
        namespaces.release(adapters)

    def of(self, page: int) -> int:
        if page < self.base_pages:
            return 0
        return self.edge if page == self.base_pages else self.rest
