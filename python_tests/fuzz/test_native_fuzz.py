"""A share of the calls of the native module with anything at all; `make fuzz-native` makes more."""

from __future__ import annotations

from native_fuzz import ALLOWED, Bytes, run_random


def test_the_native_module_serves_or_refuses_whatever_comes():
    counts = run_random(4000, seed=0)
    allowed = {"served", "NotImplementedError", *(error.__name__ for error in ALLOWED)}
    assert set(counts) <= allowed
    assert counts["served"] > 2000
    assert counts["ValueError"] > 100


def test_bytes_that_run_out_are_zeros():
    take = Bytes(b"\x05")
    assert [take.pick(0, 9), take.pick(0, 9), take.pick(3, 300)] == [5, 0, 3]
