"""Tool calls and reasoning in answers, tools and tool choices in requests: pure text and data, without I/O."""
