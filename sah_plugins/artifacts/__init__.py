"""What tools that make artefacts share; no plugins in here."""
