"""The tables and figures of Meng et al. 2021, arXiv:2111.04726: `python -m bench.paper`."""
