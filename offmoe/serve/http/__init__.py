"""The HTTP APIs of the engine: OpenAI's chat, completions and responses, Anthropic's messages."""
