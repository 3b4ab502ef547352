"""The keywords of 1.2: those of 1.1 and, as Mobilint's model zoo gives them to 1.2, target_device and inference_scheme."""

from mobilint_compiler import equal

from qbcompiler import _api_1_1
from qbcompiler._api_1_1 import *  # noqa: F403
from qbcompiler._api_1_1 import __all__  # noqa: F401


def mxq_compile(*, target_device, inference_scheme, **others):
    equal("target_device, inference_scheme", (target_device, inference_scheme), ("aries-rb", "all"))
    _api_1_1.mxq_compile(**others)
