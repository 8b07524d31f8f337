"""Attribution of whole data sets: :func:`attribute` writes maps, :func:`open_maps` reads them."""

from .job import Settings
from .local import Outcome, attribute
from .maps import Map, Maps, open_maps

__all__ = ["Map", "Maps", "Outcome", "Settings", "attribute", "open_maps"]
