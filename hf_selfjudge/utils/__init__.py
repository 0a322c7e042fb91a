"""Files, names and text: in paths and strings, out files that are whole or absent, names that are safe to publish,
and text escaped for where it is shown. Knows nothing of models."""
