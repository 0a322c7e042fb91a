"""Uploads what the other commands wrote to Hub repositories, each in one commit, and downloads judges."""
