"""Small faults to plant in the program, each with the tests that must find it: how good the tests are, in numbers.

Run with `python -m tests.mutants`; it is no part of `make test`, where tests/test_mutants.py only checks that every
fault still fits the source.
"""
