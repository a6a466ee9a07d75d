"""`opsin serve`: the OpenAI-compatible HTTP server."""
