"""Writes files whole or not at all, moves them to and from the Hub, names models so that the name can be published,
and escapes text for Markdown, shells and terminals. It loads no model."""
