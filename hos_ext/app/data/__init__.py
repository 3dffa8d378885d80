"""Data sets for training: opened, split, scaled, augmented, and served as batches.

`open_source` is the way in. Each kind of data set is one file in `sources/`; `register_source`
makes another one known, from any package. scikit-learn, pillow, pyarrow and `datasets` come with
the extra `app`. Only `hf:` writes to disk: to Hugging Face's own cache.
"""

from .augment import augment, distort
from .files import files_of
from .images import decode_image, decode_pages, image_rows
from .labels import Labels, class_number, classes_of, drop_labels
from .opening import open_rows, open_source, read_samples
from .own import as_source
from .pictures import Pictures
from .registry import register_source, source_forms
from .rows import LIMIT, Classes, Request, Rows, array_rows, refusal
from .scaling import GREY_LEVELS, Scaling, dequantise, to_grey
from .source import Source
from .sources.density import known_density
from .sources.digits import SHAPE, Digits, load_digits
from .splits import Parts, batch_rows
from .streams import Examples, examples_of

__all__ = [
    "GREY_LEVELS",
    "LIMIT",
    "SHAPE",
    "Classes",
    "Digits",
    "Examples",
    "Labels",
    "Parts",
    "Pictures",
    "Request",
    "Rows",
    "Scaling",
    "Source",
    "array_rows",
    "as_source",
    "augment",
    "batch_rows",
    "class_number",
    "classes_of",
    "decode_image",
    "decode_pages",
    "dequantise",
    "distort",
    "drop_labels",
    "examples_of",
    "files_of",
    "image_rows",
    "known_density",
    "load_digits",
    "open_rows",
    "open_source",
    "read_samples",
    "refusal",
    "register_source",
    "source_forms",
    "to_grey",
]
