"""Configuration: the pydantic schema and the YAML loader."""
