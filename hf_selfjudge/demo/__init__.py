"""Shows a judged pair on a web page: each token with who decided it."""
