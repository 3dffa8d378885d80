"""`python -m hos_ext.app.cli`: the command `hos-ext`, for torchrun."""

from . import main

main()
