"""The page: in a judged pair, out a web page that shows who decided each token."""
