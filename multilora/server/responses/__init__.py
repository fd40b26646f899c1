"""`/v1/responses`: OpenAI's Responses API, translated to the chat route's jobs and back."""
