"""The golden arrays of the reference implementation; their README says how they were made.

JFLOW_GOLDEN points the same tests at another folder of goldens, with other dimensions.
"""

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

REPO = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("JFLOW_GOLDEN", REPO / "tests" / "golden"))

# Float32 rounding of the goldens stays below 1.2e-5, the subtlest mistake moves 3.4e-5 (NOTES.md).
ATOL = 2e-5


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file, by name, in the reference's layout (NCHW)."""
    return load_file(GOLDEN / f"{name}.safetensors")


def nhwc(array: np.ndarray) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(array, -3, -1)
