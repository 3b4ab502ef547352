"""A stand-in for Mobilint's qbcompiler, by the version in its metadata: the API of 1.0, or that of 1.1 and newer; see mobilint_compiler.py."""

import importlib.metadata

if importlib.metadata.version("qbcompiler").startswith("1.0."):
    from qbcompiler._api_1_0 import *  # noqa: F403
else:
    from qbcompiler._api_1_1 import *  # noqa: F403
