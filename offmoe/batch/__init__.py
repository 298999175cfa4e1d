"""Files of prompts: OpenAI's batch format in, results in the same order out."""
