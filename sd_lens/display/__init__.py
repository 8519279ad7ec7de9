"""Pictures and the report; they see results only, never a model."""
