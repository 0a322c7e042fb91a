"""Reads and writes files, moves them to and from the Hub, makes names that can be published, and escapes text for
Markdown, shells and terminals. It loads no model."""
