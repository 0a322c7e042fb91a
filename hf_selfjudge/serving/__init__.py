"""Serving: the judge inside vLLM. It builds on vLLM's own extension points and patches nothing."""
