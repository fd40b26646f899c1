"""What the limits of host and device tier refuse: an adapter, a pin, or a new limit. Changes nothing itself.

`AdapterStore` asks before it takes an adapter in. Pinned adapters are counted as if they were resident already. A pin
and a new limit look at every adapter that is loaded; both are rare.
"""

from collections.abc import Sequence

from multilora.adapters.lifecycle.device_tier import DeviceTier
from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.version import AdapterVersion
from multilora.errors import AdapterIncompatible, AdapterStarvation, ConfigError


class TierLimits:
    """total_pages: of the arena; context_pages: what one full-context request takes (for the starvation rule);
    page_bytes: of one rank's page on the device; host_page_bytes: of the same page of all ranks, on the host."""

    def __init__(
        self,
        host: HostTier,
        device: DeviceTier,
        *,
        page_bytes: int,
        host_page_bytes: int,
        total_pages: int,
        context_pages: int,
    ):
        self.page_bytes = page_bytes
        self.host_page_bytes = host_page_bytes
        self.total_pages = total_pages
        self._host = host
        self._device = device
        self._context_pages = context_pages

    @property
    def device_pages(self) -> int:
        """Pages that all resident adapters together may take: the limit that is set, or the arena."""
        return min(self._device.max_pages or self.total_pages, self.total_pages)

    def largest_bytes(self) -> int:
        """Size on the host of the largest adapter that could ever be resident."""
        return min(self.device_pages, self.total_pages - 1) * self.host_page_bytes

    def check_room(self, path: str, pages: int, pinned_pages: int) -> None:
        """Refuse an adapter that could never be resident beside those that are pinned already."""
        limit = self._device.max_pages
        if limit is not None and pages > limit - pinned_pages:
            raise AdapterIncompatible(
                f"incompatible: {path} takes {pages} pages; pinned adapters leave {limit - pinned_pages} "
                "under --lora-device-bytes"
            )

    def check_pin(self, path: str, pages: int, known: Sequence[AdapterVersion]) -> None:
        """Refuse a pin that would leave too little for all other adapters and requests."""
        device = self._device
        others = [a for a in known if a.pinned]
        if device.max_count is not None and len(others) + 1 >= device.max_count:
            raise AdapterStarvation(
                f"starvation: pinning {path} would take the last of --max-loras-per-batch "
                f"{device.max_count}; unpin or unload another adapter, or load this one unpinned"
            )
        pinned = pages + sum(a.pages for a in others)
        largest = max([pages, *(a.pages for a in known)])
        if self.total_pages - pinned < self._context_pages + largest:
            raise AdapterStarvation(
                f"starvation: with {path} pinned, {self.total_pages - pinned} pages would remain; one "
                f"full-context request and the largest adapter need {self._context_pages + largest}"
            )
        if device.max_pages is not None and device.max_pages - pinned < largest:
            raise AdapterStarvation(
                f"starvation: pinning {path} would leave no room for another under --lora-device-bytes"
            )
        unpinned = [a.pages for a in known if not a.pinned]
        if unpinned and not self._host.has_room_for(2, (pages + max(unpinned)) * self.host_page_bytes):
            raise AdapterStarvation(
                f"starvation: pinning {path} would leave no room for the adapters that are loaded already "
                "under --max-loaded-loras or --lora-host-bytes"
            )

    def check_device(self, device_bytes: int | None, max_count: int | None, known: Sequence[AdapterVersion]) -> None:
        """Refuse limits of the device tier under which an adapter that is loaded could never run again."""
        pinned = [a for a in known if a.pinned]
        needs = len(pinned) + (len(pinned) < len(known))
        if max_count is not None and max_count < max(1, needs):
            raise ConfigError(
                f"--max-loras-per-batch {max_count}: must be at least {max(1, needs)}, with {len(pinned)} adapters "
                f"pinned of {len(known)} loaded"
            )
        if device_bytes is None:
            return
        largest = max((a.pages for a in known if not a.pinned), default=0)
        least = max(1, largest + sum(a.pages for a in pinned)) * self.page_bytes
        if device_bytes < least:
            raise ConfigError(
                f"--lora-device-bytes {device_bytes}: must be at least {least}, what the pinned and the largest "
                "other adapter loaded take"
            )
