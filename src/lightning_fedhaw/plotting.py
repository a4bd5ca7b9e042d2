"""Figures of finished runs, under the name that projects import."""

from lightning_fedhaw.report.plotting import *  # noqa: F403
from lightning_fedhaw.report.plotting import __all__ as __all__
