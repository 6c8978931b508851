"""Rows of outside data sets: from a local folder, or from the hub at a known commit; no plugins."""
