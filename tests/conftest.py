"""Check every shape in every signature of `toco_core` while the tests run."""

from jaxtyping import install_import_hook

_hook = install_import_hook("toco_core", "shape_check.check")

import toco_core  # noqa: E402, F401  before anything imports timm (see toco_core/_torchvision.py)
