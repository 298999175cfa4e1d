"""Requests and answers of a chat, without HTTP: messages, templates, sampling, constraints, tool calls, reasoning."""
