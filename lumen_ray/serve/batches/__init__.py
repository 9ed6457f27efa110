"""`/v1/files` and `/v1/batches` in OpenAI's format, over the ledger of label jobs."""
