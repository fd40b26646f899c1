"""Architectures that an examination on the meta device takes for servable and that are not, with the reason."""

PADDED_POSITIONS = "it numbers positions from its padding token on"

REFUSED: dict[str, str] = {
    "CamembertForCausalLM": PADDED_POSITIONS,
    "Data2VecTextForCausalLM": PADDED_POSITIONS,
    "HrmTextForCausalLM": "its nested loops amplify rounding until answers cannot be compared",
    "RobertaForCausalLM": PADDED_POSITIONS,
    "RobertaPreLayerNormForCausalLM": PADDED_POSITIONS,
    "XLMRobertaForCausalLM": PADDED_POSITIONS,
    "XLMRobertaXLForCausalLM": PADDED_POSITIONS,
    "XmodForCausalLM": PADDED_POSITIONS,
}
