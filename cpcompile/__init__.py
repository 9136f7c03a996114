"""cpcompile: optimal, proven and explained token parallelism for tensor-parallel DeepSeek inference."""
