"""A stand-in for Mobilint's qbcompiler, by the version in its metadata: the API of 1.0, 1.1, 1.2 or 1.3; see mobilint_compiler.py."""

import importlib.metadata

version = importlib.metadata.version("qbcompiler")
if version.startswith("1.0."):
    from qbcompiler._api_1_0 import *  # noqa: F403
elif version.startswith("1.1."):
    from qbcompiler._api_1_1 import *  # noqa: F403
elif version.startswith("1.2."):
    from qbcompiler._api_1_2 import *  # noqa: F403
else:
    from qbcompiler._api_1_3 import *  # noqa: F403
