"""Read by every kernel that the tests start (conftest.py at the root)."""

import os

from tests import gradient_noise, labelled_figures

labelled_figures.install()
if "MINIDS_GRADIENT_NOISE" in os.environ:
    gradient_noise.install(int(os.environ["MINIDS_GRADIENT_NOISE"]))
