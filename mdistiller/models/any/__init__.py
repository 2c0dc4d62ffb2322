"""Networks of other libraries and the user's own networks, with the features contract of ``models/_features.py``.

- ``names.py``: ``timm:NAME[.tag]``, ``torchvision:NAME`` and ``package.module:factory`` as names of networks
- ``adapter.py``: :func:`with_features` makes a network return ``(logits, features)``
- ``timm_maps.py``, ``probed_maps.py``: the sources of the features
- ``inputs.py``: resizes and normalises images for a network
- ``classes.py``: a teacher's outputs for the classes of another data set
"""

from .adapter import with_features, with_outputs, without_features
from .classes import output_names, read_outputs
from .inputs import RESIZE, Input
from .names import FINDERS, find_network, is_code, is_foreign, names_like

__all__ = [
    "FINDERS", "RESIZE", "Input", "find_network", "is_code", "is_foreign", "names_like", "output_names", "read_outputs",
    "with_features", "with_outputs", "without_features",
]  # fmt: skip
