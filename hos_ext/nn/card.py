"""The model card of a model: what it is, and how it is used, as Markdown for the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: hos_ext
tags:
- hos_ext
- denoising
- score-matching
- uncertainty
---

# {name}

A second-order score model, made with hos_ext. Given x = x0 + sigma z, where z is standard normal
noise, it gives the mean of the clean sample x0 and the covariance of what the noise hid.

```python
import hos_ext, torch

model, config = hos_ext.load_model("{repo}")
x = torch.randn(8, {dims})  # noisy samples, in data units
with torch.no_grad():
    result = hos_ext.posterior(x, model(x, {sigma}), {sigma})
result.mean, result.std
```

| model | |
|---|---|
| class | {kind} |
| shape of a sample | {shape} ({size} entries) |
| rank of the covariance beside its diagonal | {rank} |
| conditions | {conditions} |

{sections}"""


def model_card(config: Mapping[str, Any], repo_id: str, sections: str = "") -> str:
    """The card as text.

    Args:
        config: of the model, as it is saved.
        repo_id: user/name.
        sections: Markdown that follows: data, objective, calibration.
    """
    inner = config.get("head", config)
    dims, classes = inner["dims"], inner.get("num_classes")
    name, kind = repo_id.partition("/")[2], config["_class_name"]
    return _CARD.format(
        name=name,
        repo=repo_id,
        dims=", ".join(map(str, dims)),
        sigma=0.4,
        kind=kind if inner is config else f"{kind} with a head of class {inner['_class_name']}",
        shape=tuple(dims),
        size=math.prod(dims),
        rank=inner["rank"],
        conditions="none" if classes is None else f"label, 0 to {classes - 1}",
        sections=sections.strip() + "\n" if sections else "",
    )
