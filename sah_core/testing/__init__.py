"""What plugins are tested with: golden cases and conformance checks."""
