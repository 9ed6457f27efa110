"""Batch files of chat requests in OpenAI's format, answered by the workers of label jobs."""
