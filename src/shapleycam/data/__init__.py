"""Images and data sets, read and decoded; no models in here."""
