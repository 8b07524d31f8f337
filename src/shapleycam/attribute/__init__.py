"""Attribution of whole data sets: :func:`attribute` writes maps, :func:`open_maps` reads them."""

from .job import Settings
from .local import Outcome, attribute

__all__ = ["Outcome", "Settings", "attribute"]
