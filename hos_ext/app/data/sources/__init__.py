"""The data sources that come with the package: one file each, imported here to be registered.

Error messages list them in this order.
"""

from . import digits as digits  # isort: skip
from . import hf as hf  # isort: skip
from . import parquet as parquet  # isort: skip
from . import folder as folder  # isort: skip
from . import npy as npy  # isort: skip
from . import csv as csv  # isort: skip
from . import density as density  # isort: skip

__all__ = ["csv", "density", "digits", "folder", "hf", "npy", "parquet"]
