"""One loaded model for many conversations: the engine, and the HTTP APIs in front of it."""
