"""Architectures that an examination on the meta device takes for servable and that are not, with the reason."""

REFUSED: dict[str, str] = {}
