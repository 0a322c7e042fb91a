"""Decodes: takes a target, a rule and a draft, and returns text and who decided each token. It does not know
where a judge comes from."""
