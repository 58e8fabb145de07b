"""One test for every defect of TextBrewer 0.2.1: each fails there and passes here.

The tests use torch and TextBrewer's public API alone, so ``benchmarks/was_wrong.py`` can run this folder in the
original's environment too. The first line of a test's docstring is the defect; the rest says how it is shown where
that is not plain.
"""
