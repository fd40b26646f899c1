"""Routes that read prompts and answer with numbers, in the forms of OpenAI, vLLM and SGLang."""
