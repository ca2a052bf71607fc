"""The endpoint: OpenAI's chat completions from the same three stages, on Ray Serve or in one process."""
