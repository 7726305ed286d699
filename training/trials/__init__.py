"""Trials of what wakes late tokens: named changes of one preset, each trained within the same budget and measured.

What is here is for trials only; what proved worth its place is a switch of the tokenizer or of its loss. The method
and the results are in `docs/tokens.md`.
"""
