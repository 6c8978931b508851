"""The maths of scorers, one module per kind of metric; no plugins here."""
