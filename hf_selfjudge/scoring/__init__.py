"""Compares two answers, scores an answer by references or tests, and computes intervals. It does not know how
answers are decoded."""
