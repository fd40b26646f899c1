"""`/v1/messages`: Anthropic's Messages API, translated to the chat route's jobs and back."""
