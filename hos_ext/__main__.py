"""`python -m hos_ext`: how this copy was built."""

from . import build_info

for key, value in build_info().items():
    print(f"{key}: {value}")
