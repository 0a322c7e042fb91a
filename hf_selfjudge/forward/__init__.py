"""Runs forwards of a model and reads them: hidden states of any forward, many calls in lock-step, many branches of
one text in a shared cache. It knows neither drafts nor judges."""
